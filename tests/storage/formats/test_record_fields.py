"""Fields by path, and what becomes text."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pytest

from tropd.storage.formats.record_fields import MAX_TEXT, field_names, field_text, value_at

RECORD = {"messages": [{"role": "user", "content": "hi"}], "a.b": 1, "a": {"b": 2}, "null": None}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("messages.0.content", "hi"),
        ("messages.1.content", None),
        ("messages.0.content.0", None),
        ("messages.x", None),
        pytest.param("messages." + "9" * 5000, None, id="digits"),
        ("a.b", 1),
        ("null.x", None),
        ("", None),
    ],
)
def test_paths_lead_into_lists_and_objects_and_nowhere_else(path: str, value: Any) -> None:
    assert value_at(RECORD, path) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ("42.0", "42.0"),
        (42, "42"),
        (-(10**30), "-1" + "0" * 30),
        (42.0, "42"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (Decimal("1e16"), "1" + "0" * 16),
        (Decimal("3.14159265358979323846"), "3.14159265358979323846"),
        (Decimal("12345678901234567890123456789012345.0"), "12345678901234567890123456789012345"),
    ],
)
def test_text_and_numbers_are_text(value: Any, text: str | None) -> None:
    assert field_text({"x": value}, "x", "data.answer_field") == text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["6"], r"is a list of 1 values, not text; name one of its values in data.answer_field: x\.0$"),
        ([], "is a list of 0 values, not text$"),
        ([{"id": 1, "value": ["y"]}], r"in data.answer_field: x\.0\.value\.0$"),
        ({"k": [1]}, r"is an object of 1 fields, not text; .* in data.answer_field: x\.k\.0$"),
        (True, 'is true, not text; write "true" if that is meant'),
        (float("nan"), "is nan, no number"),
        (Decimal("1e400"), "no number that can be"),
        (Decimal("1e-400"), "too small"),
        (1e17, "may have lost digits; store it as text"),
        pytest.param(10**5000, "too many digits", id="digits"),
        ("\ud800", "half of a surrogate pair"),
        pytest.param("x" * (MAX_TEXT + 1), "1,000,001 characters", id="long"),
        (b"x", "is bytes, neither"),
        (datetime.date(2020, 1, 1), "is date, neither"),
    ],
)
def test_what_is_no_text_is_refused_with_a_way_out(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"field 'x' .*{words}"):
        field_text({"x": value}, "x", "data.answer_field")


def test_names_of_fields_can_be_shown_whatever_they_are() -> None:
    assert field_names({"é\ud800\n": 1, "a": 2}) == "a, é\\ud800\\n"
    assert field_names({}) == "none"
    assert len(field_names({"x" * 10_000: 1})) < 300
