"""Reading, merging, checking and writing configurations, with the source of every value."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError

from tropd.pipeline.config import Config, to_plain
from tropd.pipeline.objectives.spec import Objective, Spec
from tropd.storage.errors import ConfigError

Plain = dict[str, Any]
_DISCRIMINATORS = ("rule", "estimator", "kind")


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration, and for every leaf field the place that its value comes from."""

    config: Config
    sources: Mapping[str, str]

    def source(self, path: str) -> str:
        """Where the value of a dotted field path comes from."""
        return self.sources.get(path, "default")


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
        what = "recipe" if kind == "runs" else "objective"
        raise ConfigError(
            f"unknown {what} {name!r}", hint=f"{_closest(name, names)}one of: {', '.join(names)}"
        )
    return (resources.files("tropd.pipeline.recipes") / kind / f"{name}.toml").read_text(encoding="utf-8")


def load_objective(name: str, overrides: Plain | None = None) -> Objective:
    """A named objective with some fields replaced.

    Raises:
        ConfigError: unknown name, or impossible overrides.
    """
    data = tomllib.loads(recipe_text(name, "objectives"))
    merged = _merge(data, overrides or {})
    return _validated(Objective, merged, where=f"objective {name!r}", prefix="objective")


def load_config(path: Path, assignments: Sequence[str] = ()) -> ResolvedConfig:
    """Read ``config.toml``, apply ``section.field=value`` assignments, and check everything.

    Raises:
        ConfigError: with the file, the field's path, the reason and what would be valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint="tropd init WORKSPACE --recipe demo") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="TOML files are UTF-8 text") from error
    return parse_config(text, assignments, where=str(path))


def parse_config(text: str, assignments: Sequence[str] = (), *, where: str = "config.toml") -> ResolvedConfig:
    """As ``load_config``, from text."""
    try:
        data: Plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    sources = dict.fromkeys(_leaves(data), where)
    for assignment in assignments:
        override = parse_assignment(assignment)
        data = _merge(data, override)
        sources.update(dict.fromkeys(_leaves(override), f"--set {assignment}"))
    objective = data.get("objective", {"name": "tropd"})
    if isinstance(objective, dict):
        name = objective.get("name", "tropd")
        if not isinstance(name, str):
            raise ConfigError(f"{where}: objective.name must be a string, not {name!r}")
        base = tomllib.loads(recipe_text(name, "objectives"))
        sources = {f"objective.{leaf}": f"objective {name!r}" for leaf in _leaves(base)} | sources
        data = {**data, "objective": _merge(base, objective)}
    config = _validated(Config, data, where=where)
    return ResolvedConfig(config, sources)


def parse_assignment(text: str) -> Plain:
    """Turn ``section.field=value`` into nested dicts. The value is TOML; what is not TOML is a string.

    Raises:
        ConfigError: there is no ``=`` or no field path.
    """
    path, separator, raw = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {text!r} is not of the form section.field=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


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
        names = [f.path for f in everything]
        raise ConfigError(
            f"there is no configuration field {path!r}",
            hint=f"{_closest(path, names)}tropd config show lists all",
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


def _validated(model: type[Any], data: Plain, *, where: str, prefix: str = "") -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = _path_of(model, problem["loc"], prefix)
            lines.append(f"{path}: {_explain_problem(model, problem, data)}")
        raise ConfigError(
            f"{where}: " + "\n  ".join(lines), hint="tropd config explain FIELD shows what a field takes"
        ) from error


def _path_of(model: type[BaseModel], location: tuple[int | str, ...], prefix: str) -> str:
    """Dotted path without the tags that pydantic inserts for discriminated unions."""
    tags = {"all", "none", "sampled", "expected", "ratio", "sign", "teacher_entropy", "zero", "k1", "nll"}
    tags |= {"topk_fkl", "topk_rkl", "topk_jsd", "student_entropy_top", "advantage_floor", "soft_or_top"}
    tags |= {"prefix_importance", "overlap_drift"}
    parts = [str(p) for p in location if p not in tags]
    path = ".".join([prefix, *parts] if prefix else parts)
    return path or model.__name__.lower()


def _explain_problem(model: type[BaseModel], problem: Any, data: Plain) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        valid = _siblings(model, problem["loc"])
        return (
            f"unknown field; {_closest(name, valid)}valid: {', '.join(valid)}" if valid else "unknown field"
        )
    if kind == "missing":
        return "required, but not given"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = problem.get("input")
    if isinstance(shown, dict | list):
        return message
    return f"{message} (got {shown!r})"


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names that are valid where an unknown one was given."""
    current: Any = model
    for part in location[:-1]:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = fields[part].annotation
            continue
        members = getattr(current, "__args__", ())
        tagged = [
            m
            for m in _flatten_union(members)
            if any(m.model_fields.get(d) and m.model_fields[d].default == part for d in _DISCRIMINATORS)
        ]
        if tagged:
            current = tagged[0]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _flatten_union(members: Sequence[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
        else:
            found.extend(_flatten_union(getattr(member, "__args__", ())))
    return found


def _merge(base: Plain, override: Plain) -> Plain:
    """Deep merge. A table whose kind (rule, estimator, …) changes is replaced, not mixed."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            switched = any(d in value and d in old and value[d] != old[d] for d in _DISCRIMINATORS)
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


def _closest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
