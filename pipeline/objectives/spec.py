"""The base of all configuration, and the marks of fields that no fingerprint takes from their section."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict

MOST_FACTOR = 1e9
"""Bound of factors, and of advantages and entropies in nats."""


class Spec(BaseModel):
    """Base of all configuration: unknown fields, infinities and NaN are refused, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class FieldMark(Enum):
    """Why the fingerprint of a stage that takes a whole section leaves out one of its fields.

    A field without a mark decides the result: with another value, the stage's existing output is refused.
    """

    INERT = "no result depends on it"
    APART = "the stages that depend on it record it by themselves: what it leads to, or only where it matters"


T = TypeVar("T")
Inert = Annotated[T, FieldMark.INERT]
Apart = Annotated[T, FieldMark.APART]


def field_marks(kind: type[Spec]) -> Mapping[str, FieldMark]:
    """The marked fields of a section."""
    found = ((name, m) for name, info in kind.model_fields.items() for m in info.metadata)
    return {name: mark for name, mark in found if isinstance(mark, FieldMark)}
