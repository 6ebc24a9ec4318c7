"""Nested tables of a TOML file: merged, listed, without values that TOML cannot express."""

from __future__ import annotations

from typing import Any

from tropd.pipeline.config.paths import discriminators
from tropd.pipeline.config.schema import Config
from tropd.storage.formats.toml_text import Plain

KINDS = frozenset(discriminators(Config))
"""Fields that name a table's kind. A ``kind`` counts as one also where it tells no members of a union apart."""


def merge_settings(base: Plain, override: Plain) -> Plain:
    """Deep merge. A table whose kind (rule, estimator, …) changes is replaced, not mixed."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            switched = any(d in value and d in old and value[d] != old[d] for d in KINDS)
            merged[key] = dict(value) if switched else merge_settings(old, value)
        else:
            merged[key] = value
    return merged


def leaves(data: Plain, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict):
            names.extend(leaves(value, f"{prefix}{key}."))
        else:
            names.append(f"{prefix}{key}")
    return names


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())
