"""Reading TOML: limits, and the lines of values."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tropd.storage.errors import ConfigError
from tropd.storage.formats.toml_text import (
    MOST_BYTES,
    MOST_LEVELS,
    NotTomlError,
    line_of,
    parse_toml,
    read_text,
)

LARGE = 200_000
"""Repetitions that a parser without limits recurses into, or takes minutes for."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * LARGE, "nested more than"),
        ("a = " + "{b = " * LARGE, "nested more than"),
        ("a." * LARGE + "b = 1", "parts"),
        ("[" + "a." * LARGE + "b]", "parts"),
        ("x = {" + "a." * LARGE + "b = 1}", "parts"),
        ("a = " + "9" * 5000, "digits"),
        ("a = 0x" + "f" * 17, "64 bits"),
        ("[t]\nday = [2020-01-01]", "t.day.0 is a date"),
        ("a = 10:00:00", "a is a date or a time"),
        ('a = """' + '\\"""' * LARGE, "not valid TOML"),
        ("a = 1\nb = = 2", "line 2"),
    ],
)
def test_what_no_setting_could_be_is_refused_at_once(text: str, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(NotTomlError, match=reason) as caught:
        parse_toml(text, "here.toml")
    assert str(caught.value).startswith("here.toml")
    assert time.process_time() - start < 3


def test_texts_and_comments_are_no_structure() -> None:
    deep = "[" * 2 * MOST_LEVELS + "a." * 2 * MOST_LEVELS
    text = f'''a = '{deep}' # {deep}\nb = "\\"{deep}"\nd = """\\"{deep}\n"""\n''' + f"c = '''\n{deep}\n'''\n"
    assert parse_toml(text, "") == {"a": deep, "b": f'"{deep}', "c": f"{deep}\n", "d": f'"{deep}\n'}


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("a = 1\n#" + " " * MOST_BYTES)
    with pytest.raises(ConfigError, match="has more than"):
        read_text(path)


def test_the_line_of_a_value() -> None:
    text = "a = 1\n[b]\nc = '''\nx\n'''\n[[d]]\ne = [\n 1,\n 2,\n]\n[[d]]\ne = []\n"
    lines = {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 5,
        ("d", 0): 6,
        ("d", 0, "e"): 10,
        ("d", 1, "e"): 12,
        ("b", "x"): None,
    }
    assert {path: line_of(text, path) for path in lines} == lines
