"""Each field of a configuration with its value, its source and its meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tropd.pipeline.config.problems import renamed
from tropd.pipeline.config.resolve import ResolvedConfig
from tropd.pipeline.config.schema import to_plain
from tropd.pipeline.config.tables import one_line
from tropd.pipeline.objectives.spec import Spec
from tropd.storage.errors import ConfigError, closest


@dataclass(frozen=True)
class FieldInfo:
    """One configuration field, as ``tropd config explain`` shows it."""

    path: str
    value: Any
    source: str
    default: Any
    kind: str
    documentation: str


def explain(resolved: ResolvedConfig, path: str) -> list[FieldInfo]:
    """Every leaf field at or below a dotted path (all with an empty path).

    Raises:
        ConfigError: the field does not exist; the message names close ones.
    """
    everything = list(_walk(resolved, resolved.config, ""))
    found = [f for f in everything if not path or f.path == path or f.path.startswith(f"{path}.")]
    if not found:
        now, names = renamed(tuple(path.split("."))), [f.path for f in everything]
        advice = f"it is {now} now; " if now is not None else closest(path, names)
        raise ConfigError(
            f"configuration field {path!r} does not exist", hint=f"{advice}tropd config show lists all"
        )
    return found


def _walk(resolved: ResolvedConfig, model: BaseModel, prefix: str) -> list[FieldInfo]:
    fields: list[FieldInfo] = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            fields.extend(_walk(resolved, value, f"{path}."))
            continue
        annotation = info.annotation
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        plain = (
            [to_plain(v) if isinstance(v, Spec) else v for v in value] if isinstance(value, tuple) else value
        )
        fields.append(
            FieldInfo(path, plain, resolved.source(path), default, kind, one_line(info.description))
        )
    return fields
