"""Values of a record by name, and as text: only values that are meant as text become text.

A field is named by its name, or by a path of names and numbers that leads into objects and lists: ``messages.1.content``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

MAX_TEXT = 1_000_000
"""Most characters of one text: some 250,000 tokens."""

_EXACT = 2.0**53
"""Smallest float that may stand for another integer than the one that was written."""
_TELLING = ("content", "value", "text")


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value that a path leads to; None where it is null, or leads nowhere."""
    if path in record:
        return record[path]
    value: Any = record
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def field_text(record: Mapping[str, Any], path: str, setting: str) -> str | None:
    """A field as text; None where it is null or absent. Numbers are written plainly, whole ones without a fraction.

    Args:
        setting: name of the setting that has the path, for the error: ``data.answer_field``.

    Raises:
        ValueError: it is something else, a number that has no exact text, half of a surrogate pair, or too long.
    """
    value = value_at(record, path)
    if value is None:
        return None
    try:
        return _text(value)
    except ValueError as error:
        way_out = ""
        if isinstance(value, list | Mapping) and value:
            way_out = f"; name one of its values in {setting}: {path}{_first(value)}"
        raise ValueError(f"field {path!r} {error}{way_out}") from None


def field_names(record: Mapping[str, Any]) -> str:
    """The names of a record's fields, to be shown."""
    names = ", ".join(sorted(map(str, record))) or "none"
    return printable(names if len(names) <= 200 else f"{names[:200]}…")


def printable(text: str) -> str:
    """A text that every terminal and file takes: halves of surrogate pairs and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return _whole(value)
    if isinstance(value, bool):
        raise ValueError(f'is {str(value).lower()}, not text; write "{str(value).lower()}" if that is meant')
    if isinstance(value, int):
        try:
            return _whole(str(value))
        except ValueError:
            raise ValueError("is a number of too many digits") from None
    if isinstance(value, float | Decimal):
        return _number(value)
    if isinstance(value, Mapping):
        raise ValueError(f"is an object of {len(value)} fields, not text")
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        raise ValueError(f"is a list of {len(value)} values, not text")
    raise ValueError(f"is {type(value).__name__}, neither text nor a number")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text):,} characters; a text has at most {MAX_TEXT:,}")
    return text


def _number(value: float | Decimal) -> str:
    """A number in plain digits: 42.0 (as 42 becomes in a column with gaps) as 42, 1e-7 as 0.0000001."""
    near = float(value)
    if not math.isfinite(near):
        raise ValueError(f"is {value}, no number that can be an answer or a name")
    if isinstance(value, float) and abs(value) >= _EXACT:
        raise ValueError(f"is {value}, a float that may have lost digits; store it as text")
    if value != 0 and near == 0:
        raise ValueError(f"is {value}, too small a number")
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    text = format(exact, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return _whole("0" if text in ("-0", "") else text)


def _first(value: Any) -> str:
    """The path from a list or an object to a value in it that is neither; for an example."""
    path = ""
    while isinstance(value, list | Mapping) and value and len(path) < 100:
        if isinstance(value, Mapping):
            step = next((name for name in _TELLING if name in value), next(iter(value)))
            value, path = value[step], f"{path}.{step}"
        else:
            value, path = value[0], f"{path}.0"
    return printable(path)
