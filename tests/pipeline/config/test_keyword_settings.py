"""Settings as keywords: nested or dotted, into a configuration or as overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.keyword_settings import as_assignments, flat, with_settings
from tropd.pipeline.config.resolve import parse_assignment
from tropd.storage.errors import ConfigError


def test_nested_and_dotted_settings_are_the_same() -> None:
    nested = {"train": {"steps": 3, "betas": (0.9, 0.95)}, "student": {"lora": {"rank": 4}}}
    dotted = {"train.steps": 3, "train.betas": (0.9, 0.95), "student.lora.rank": 4}
    assert flat(nested) == flat(dotted) == dotted
    base = {"student": {"model": "m"}, "data": {}}
    merged = with_settings(base, nested)
    assert merged == with_settings(base, dotted)
    assert merged["student"] == {"model": "m", "lora": {"rank": 4}}
    assert "data" not in merged
    assert base == {"student": {"model": "m"}, "data": {}}


@pytest.mark.parametrize("value", [1, 0.5, True, "a 'b' \"c\"", [1, 2], [{"a": 1}, {"b c": [0.5]}], {}])
def test_overrides_are_read_as_the_values_that_they_were(value: Any) -> None:
    (assignment,) = as_assignments({"a.b": value})
    assert parse_assignment(assignment) == {"a": {"b": value}}


def test_a_path_is_its_text() -> None:
    assert flat({"data.prompts": Path("/a/b")}) == {"data.prompts": "/a/b"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"steps": 3}, "train.steps": 4}, "train.steps is given twice"),
        ({"train.steps": None}, "train.steps = None is not a setting"),
        ({"train.steps": object()}, "is not a setting"),
    ],
)
def test_what_no_configuration_can_have_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        flat(settings)
    assert caught.value.hint or "twice" in words


def test_a_setting_inside_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps is not a section"):
        with_settings({}, {"train.steps": 3, "train.steps.more": 4})
