"""Settings of a configuration as keyword arguments: ``train={"steps": 20}``, or ``**{"train.steps": 20}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import tomlkit

from tropd.storage.errors import ConfigError


def with_settings(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's tables with settings in them; tables that stay empty are left out.

    Raises:
        ConfigError: a setting that is given twice, lies inside one that is no table, or has no value for TOML.
    """
    merged = {name: dict(section) for name, section in data.items()}
    for path, value in flat(settings).items():
        *sections, name = path.split(".")
        place: Any = merged
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {section} is not a section")
        place[name] = value
    return {name: section for name, section in merged.items() if section != {}}


def as_assignments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The same as ``--set`` has them: ``section.field=value``, with the value in TOML."""
    return tuple(f"{path}={_on_one_line(value)}" for path, value in flat(settings).items())


def _on_one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        fields = (f"{tomlkit.key(name).as_string()} = {_on_one_line(part)}" for name, part in value.items())
        return f"{{{', '.join(fields)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_on_one_line, value))}]"
    return tomlkit.item(value).as_string()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted path, whether they were nested or dotted.

    Raises:
        ConfigError: one is given twice, or has a value that a configuration cannot have.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        part = flat(value, f"{path}.") if nested else {path: _plain(path, value)}
        if twice := found.keys() & part.keys():
            raise ConfigError(f"{', '.join(sorted(twice))} is given twice")
        found |= part
    return found


def _plain(path: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        tomlkit.item(value)
    except (TypeError, ValueError) as error:
        hint = "omit it for the default" if value is None else "give a number, a text, a list or a dictionary"
        raise ConfigError(f"{path} = {value!r} is not a setting: {error}", hint=hint) from None
    return value
