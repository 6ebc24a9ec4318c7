"""Reading, merging, checking and writing configurations, with the source of every value."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from tropd.pipeline.config.problems import Origins, checked
from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.schema import Config, to_plain
from tropd.pipeline.config.sections.model_settings import StudentConfig
from tropd.pipeline.config.tables import leaves, merge_settings, one_line, without_none
from tropd.storage.errors import ConfigError
from tropd.storage.formats.toml_text import MOST_LEVELS, NotTomlError, Plain, parse_toml, read_text

OF_STUDENT = ("dtype", "trust_remote_code", "chat_template_args", "chat_template_file")
"""Settings that a teacher takes from the student whose model it is."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration, with the sources of its values."""

    config: Config
    origins: Origins

    def source(self, path: str) -> str:
        """Source of the value at a dotted field path."""
        return self.origins.sources.get(path, "default")


def load_config(path: Path, assignments: Sequence[str] = ()) -> ResolvedConfig:
    """Read ``config.toml``, apply ``section.field=value`` assignments, and check everything.

    Raises:
        ConfigError: with the field's path, the file and line or the assignment that it comes from, the reason and the
            valid values.
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
    """Load a configuration as ``load_config`` does, from text."""
    data = parse_toml(text, where)
    sources = dict.fromkeys(leaves(data), where)
    for assignment in assignments:
        override = parse_assignment(assignment)
        data = merge_settings(data, override)
        sources.update(dict.fromkeys(leaves(override), _option(assignment)))
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
        sources = {f"objective.{leaf}": f"objective {name!r}" for leaf in leaves(base)} | sources
        data = {**data, "objective": merge_settings(base, objective)}
    origins = Origins(where, text, sources)
    return ResolvedConfig(checked(Config, _with_own_teacher(data), origins), origins)


def _with_own_teacher(data: Plain) -> Plain:
    """``teacher.model = "student"`` means the student's model, in its precision."""
    teacher, student = data.get("teacher"), data.get("student", {})
    if not isinstance(teacher, dict) or not isinstance(student, dict) or teacher.get("model") != "student":
        return data
    own = {name: student[name] for name in OF_STUDENT if name in student}
    return {**data, "teacher": {**own, **teacher, "model": student.get("model", StudentConfig().model)}}


def parse_assignment(text: str) -> Plain:
    """Turn ``section.field=value`` into nested dicts. The value is TOML, or else a string.

    Raises:
        ConfigError: ``=`` or the field path is missing, or it has more levels than a configuration.
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
                table.add(tomlkit.comment(f"{field} is not set. {one_line(field_info.description)}"))
                continue
            table.add(tomlkit.comment(one_line(field_info.description)))
            table.add(field, without_none(plain[field]))
        document.add(name, table)
        del info
    return tomlkit.dumps(document)
