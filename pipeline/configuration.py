"""Reading, merging, checking and writing configurations, with the source of every value."""

from __future__ import annotations

import datetime
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel

from tropd.pipeline.config import Config, to_plain
from tropd.pipeline.config_paths import discriminators
from tropd.pipeline.config_problems import Origins, checked, renamed
from tropd.pipeline.objectives.spec import Objective, Spec
from tropd.storage.errors import ConfigError, closest, unknown_name
from tropd.storage.toml_text import MOST_LEVELS, NotTomlError, Plain, parse_toml, read_text

KINDS = frozenset(discriminators(Config))
"""Fields that say of which kind a table is. A ``kind`` counts as one also where it tells no members of a union apart."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration, and where its values come from."""

    config: Config
    origins: Origins

    def source(self, path: str) -> str:
        """Where the value of a dotted field path comes from."""
        return self.origins.sources.get(path, "default")


@dataclass(frozen=True)
class FieldInfo:
    """One configuration field, as ``tropd config explain`` shows it."""

    path: str
    value: Any
    source: str
    default: Any
    kind: str
    documentation: str


def recipe_names(kind: str = "runs") -> list[str]:
    """Names of the packaged recipes (``runs`` or ``objectives``)."""
    folder = resources.files("tropd.pipeline.recipes") / kind
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def recipe_text(name: str, kind: str = "runs") -> str:
    """Text of a packaged recipe.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    names = recipe_names(kind)
    if name not in names:
        raise unknown_name("recipe" if kind == "runs" else "objective", name, names)
    return (resources.files("tropd.pipeline.recipes") / kind / f"{name}.toml").read_text(encoding="utf-8")


def dated_recipe(text: str, date: datetime.date) -> str:
    """A recipe's text that also says which date chat templates tell, where it uses them."""
    document = tomlkit.parse(text)
    data = document.get("data", {})
    if data.get("chat", False) and "template_date" not in data:
        data.add("template_date", date.isoformat())
    return tomlkit.dumps(document)


def load_objective(name: str, overrides: Plain | None = None) -> Objective:
    """A named objective with some fields replaced.

    Raises:
        ConfigError: unknown name, or impossible overrides.
    """
    data = tomllib.loads(recipe_text(name, "objectives"))
    merged = _merge(data, overrides or {})
    return checked(Objective, merged, Origins(f"objective {name!r}", "", {}), ("objective",))


def load_config(path: Path, assignments: Sequence[str] = ()) -> ResolvedConfig:
    """Read ``config.toml``, apply ``section.field=value`` assignments, and check everything.

    Raises:
        ConfigError: with the field's path, the file and line or the assignment that it comes from, the reason and what
            would be valid.
    """
    if not path.exists():
        folder = shlex.quote(str(path.parent))
        raise ConfigError(
            f"{path} does not exist", hint=f"tropd init {folder}, with your own models or a recipe"
        )
    return parse_config(config_text(path, str(path)), assignments, where=str(path))


def config_text(path: Path, shown: str) -> str:
    """The text of a configuration file. An empty one would be all defaults, which nobody has asked for.

    Args:
        shown: the file's name in errors.

    Raises:
        ConfigError: it is empty, or no text.
    """
    text = read_text(path, shown)
    if not text.strip():
        raise ConfigError(f"{shown} is empty", hint="put it back from a copy")
    return text


def parse_config(text: str, assignments: Sequence[str] = (), *, where: str = "config.toml") -> ResolvedConfig:
    """As ``load_config``, from text."""
    data = parse_toml(text, where)
    sources = dict.fromkeys(_leaves(data), where)
    for assignment in assignments:
        override = parse_assignment(assignment)
        data = _merge(data, override)
        sources.update(dict.fromkeys(_leaves(override), _option(assignment)))
    objective = data.get("objective", {"name": "tropd"})
    if isinstance(objective, dict):
        name = objective.get("name", "tropd")
        place = Origins(where, text, sources).of(("objective", "name"))
        if not isinstance(name, str):
            raise ConfigError(f"{place}: objective.name must be a string, not {name!r}")
        try:
            base = tomllib.loads(recipe_text(name, "objectives"))
        except ConfigError as error:
            raise ConfigError(f"{place}: objective.name: {error.message}", hint=error.hint) from None
        sources = {f"objective.{leaf}": f"objective {name!r}" for leaf in _leaves(base)} | sources
        data = {**data, "objective": _merge(base, objective)}
    origins = Origins(where, text, sources)
    return ResolvedConfig(checked(Config, data, origins), origins)


def parse_assignment(text: str) -> Plain:
    """Turn ``section.field=value`` into nested dicts. The value is TOML; what is not TOML is a string.

    Raises:
        ConfigError: there is no ``=`` or no field path, or more levels than a configuration has.
    """
    path, separator, raw = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys) or len(keys) > MOST_LEVELS:
        raise ConfigError(f"{_option(text)} is not of the form section.field=value")
    try:
        value = parse_toml(f"value = {raw}", _option(text))["value"]
    except NotTomlError:
        value = raw.strip()
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


def _option(assignment: str) -> str:
    return f"--set {assignment if len(assignment) <= 200 else f'{assignment[:200]}…'}"


def dump_config(config: Config) -> str:
    """The whole resolved configuration as TOML, each field preceded by its documentation."""
    document = tomlkit.document()
    for name, info in Config.model_fields.items():
        section = getattr(config, name)
        table = tomlkit.table()
        for line in (type(section).__doc__ or "").strip().splitlines():
            table.add(tomlkit.comment(line.strip()))
        plain = to_plain(section)
        for field, field_info in type(section).model_fields.items():
            if plain[field] is None:
                table.add(tomlkit.comment(f"{field} is not set. {_one_line(field_info.description)}"))
                continue
            table.add(tomlkit.comment(_one_line(field_info.description)))
            table.add(field, _without_none(plain[field]))
        document.add(name, table)
        del info
    return tomlkit.dumps(document)


def explain(resolved: ResolvedConfig, path: str) -> list[FieldInfo]:
    """Every leaf field at or below a dotted path (all with an empty path).

    Raises:
        ConfigError: there is no such field; the message names close ones.
    """
    everything = list(_walk(resolved, resolved.config, ""))
    found = [f for f in everything if not path or f.path == path or f.path.startswith(f"{path}.")]
    if not found:
        now, names = renamed(tuple(path.split("."))), [f.path for f in everything]
        advice = f"it is {now} now; " if now is not None else closest(path, names)
        raise ConfigError(
            f"there is no configuration field {path!r}", hint=f"{advice}tropd config show lists all"
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
            FieldInfo(path, plain, resolved.source(path), default, kind, _one_line(info.description))
        )
    return fields


def _merge(base: Plain, override: Plain) -> Plain:
    """Deep merge. A table whose kind (rule, estimator, …) changes is replaced, not mixed."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            switched = any(d in value and d in old and value[d] != old[d] for d in KINDS)
            merged[key] = dict(value) if switched else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _leaves(data: Plain, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict):
            names.extend(_leaves(value, f"{prefix}{key}."))
        else:
            names.append(f"{prefix}{key}")
    return names


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
