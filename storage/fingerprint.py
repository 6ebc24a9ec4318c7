"""Fingerprints: which settings and inputs determine the output of a stage, and what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Fingerprint:
    """A flat mapping from field path to value, and its hash.

    ``fields`` holds whatever decides the stage's output: configuration values under their dotted path,
    hashes of files and models under a descriptive name, and the digests of upstream stages.
    """

    fields: Mapping[str, Scalar]

    @property
    def digest(self) -> str:
        canonical = json.dumps(dict(sorted(self.fields.items())), separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def changes_from(self, other: Mapping[str, Scalar]) -> list[tuple[str, Scalar, Scalar]]:
        """Fields that differ as ``(field, other's value, own value)``, sorted; an absent field counts as None."""
        names = sorted(self.fields.keys() | other.keys())
        return [
            (n, other.get(n), self.fields.get(n))
            for n in names
            if (n in self.fields) != (n in other) or self.fields.get(n) != other.get(n)
        ]


def flatten(prefix: str, value: object) -> dict[str, Scalar]:
    """Flatten nested mappings and lists of scalars into dotted paths (lists become JSON text)."""
    if isinstance(value, Mapping):
        flat: dict[str, Scalar] = {}
        for key, item in value.items():
            flat.update(flatten(f"{prefix}.{key}" if prefix else str(key), item))
        return flat
    if isinstance(value, list | tuple):
        return {prefix: json.dumps(value)}
    if value is None or isinstance(value, str | int | float | bool):
        return {prefix: value}
    raise TypeError(f"cannot fingerprint {prefix}: {type(value).__name__}")
