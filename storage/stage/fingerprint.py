"""Fingerprints: which settings and inputs determine the output of a stage, and what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Fingerprint:
    """A flat mapping from field path to value, and its hash.

    ``fields`` holds whatever decides the stage's output: configuration values under their dotted path,
    hashes of files and models under a descriptive name, and the digests of upstream stages.
    """

    fields: Mapping[str, Scalar]
    recent: Collection[str] = ()
    """Names of fields that older versions did not record: where another fingerprint lacks them, nothing is known."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Field → the file that decides it, or the source of its setting: for people, not part of the identity."""

    @property
    def digest(self) -> str:
        canonical = json.dumps(dict(sorted(self.fields.items())), separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def changes_from(self, other: Mapping[str, Scalar]) -> list[tuple[str, Scalar, Scalar]]:
        """Fields that differ as ``(field, other's value, own value)``, sorted.

        An absent field counts as None; a recent one that the other lacks does not count.

        Values are compared as they are hashed (1, 1.0 and true differ), so that two fingerprints with
        different digests always differ in a field.
        """
        names = sorted((self.fields.keys() | other.keys()) - set(self.missing_from(other)))
        return [
            (n, other.get(n), self.fields.get(n))
            for n in names
            if (n in self.fields) != (n in other)
            or json.dumps(self.fields.get(n)) != json.dumps(other.get(n))
        ]

    def missing_from(self, other: Mapping[str, Scalar]) -> list[str]:
        """Recent fields that the other does not have, sorted."""
        return sorted(name for name in self.recent if name in self.fields and name not in other)


def flatten(prefix: str, value: object) -> dict[str, Scalar]:
    """Flatten nested mappings into dotted paths; lists and empty mappings become JSON text.

    Raises:
        TypeError: a value that has no fixed text form.
        ValueError: two values would get the same path.
    """
    if isinstance(value, Mapping) and value:
        flat: dict[str, Scalar] = {}
        for key, item in value.items():
            part = flatten(f"{prefix}.{key}" if prefix else str(key), item)
            if clash := flat.keys() & part.keys():
                raise ValueError(f"cannot fingerprint {', '.join(sorted(clash))}: two values under one path")
            flat.update(part)
        return flat
    if isinstance(value, Mapping) and not prefix:
        return {}
    if value is None or isinstance(value, str | int | float | bool):
        return {prefix: value}
    if isinstance(value, list | tuple | Mapping):
        try:
            return {prefix: json.dumps(value, sort_keys=True)}
        except TypeError as error:
            raise TypeError(f"cannot fingerprint {prefix}: {error}") from None
    raise TypeError(f"cannot fingerprint {prefix}: {type(value).__name__}")
