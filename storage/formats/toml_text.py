"""Reading TOML: one door with limits, and the lines that values stand on."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

from tropd.storage.errors import ConfigError

Plain = dict[str, Any]


class NotTomlError(ConfigError):
    """A text is no TOML, or none that a setting could be in."""


MOST_BYTES = 1 << 20
"""Largest file that is read; the longest packaged recipe has 5 kB."""
MOST_LEVELS = 32
"""Deepest nesting of tables and arrays, and most parts of a dotted key."""
_MOST_TRIES = 64
"""Parses that are spent on finding a line."""

# Strings and comments, to the end of the text where one is not closed; the rest is structure.
_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?|#[^\n]*',
    re.DOTALL,
)
_BRACKETS = re.compile(r"[][{}]")
_LONG_KEY = re.compile(rf"(?:[^.,=\n\[\]{{}}]*\.){{{MOST_LEVELS}}}")


def read_text(path: Path, where: str | None = None) -> str:
    """The text of a TOML file, which messages call ``where``; a byte order mark at its beginning is left out.

    Raises:
        ConfigError: it is missing, unreadable, no UTF-8 text, or larger than ``MOST_BYTES``.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{where or path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where or path} cannot be read: {error}", hint="TOML files are UTF-8 text"
        ) from error
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"{where or path} has more than {MOST_BYTES:,} bytes",
            hint="settings are a few kB; data is named by its path",
        )
    return text


def parse_toml(text: str, where: str) -> Plain:
    """Plain tables, arrays, texts, numbers (integers of 64 bits) and booleans.

    Raises:
        NotTomlError: no TOML, nested too deeply, or a value that no setting takes; the message begins with ``where``.
    """
    _check_structure(text, where)
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one; an integer of thousands of digits gives a plain one
        raise NotTomlError(f"{where} is not valid TOML: {error}") from error
    _check_values(data, where)
    return data


def _check_structure(text: str, where: str) -> None:
    """Refuse text that the parser would recurse into, or take minutes for."""
    structure = _TEXT.sub("_", text)
    depth = 0
    for bracket in _BRACKETS.finditer(structure):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MOST_LEVELS:
            raise NotTomlError(f"{where} is nested more than {MOST_LEVELS} levels deep")
    if _LONG_KEY.search(structure):
        raise NotTomlError(f"{where} has a key of more than {MOST_LEVELS} parts")


def _check_values(data: Plain, where: str) -> None:
    waiting: list[tuple[str, Any]] = list(data.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{name}.{index}", inner) for index, inner in enumerate(value)]
        elif isinstance(value, datetime.date | datetime.time):
            raise NotTomlError(f"{where}: {name} is a date or a time; as text it stands in quotes")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise NotTomlError(f"{where}: {name} is an integer of more than 64 bits")


def line_of(text: str, path: tuple[str | int, ...]) -> int | None:
    """Line (from 1) on which the value of a path ends, in text that is valid TOML; None if it is absent.

    The parser tells no positions, but the beginning of a TOML text up to a line's end is TOML too, unless a value
    continues; so the first line after which the value is there is found by halving.
    """
    lines = text.splitlines(keepends=True)
    tries = _MOST_TRIES

    def is_there(count: int) -> bool:
        nonlocal tries
        while count and tries:
            tries -= 1
            try:
                return _has(tomllib.loads("".join(lines[:count])), path)
            except ValueError:
                count -= 1
        return False

    low, high = 0, len(lines)
    if not is_there(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_there(middle) else (middle, high)
    return high if tries else None


def _has(data: Any, path: tuple[str | int, ...]) -> bool:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
