"""Prompts that are held out: the same ones for a seed, and no text on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tropd.pipeline.experiments.starting.holdout import record_lines, split
from tropd.pipeline.problems.prompts import Prompt
from tropd.storage.errors import DataError


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(str(n), text, None, line=n) for n, text in enumerate(texts, 1)]


def test_no_text_is_on_both_sides() -> None:
    texts = [f"question {n % 40}" for n in range(100)] + ["Question  3", "QUESTION 7 "]
    trained, held = split(prompts(texts), 15, 0, Path("p"))
    plain = {line: " ".join(texts[line - 1].casefold().split()) for line in range(1, 103)}
    assert len(held) == len({plain[line] for line in held}) == 15
    assert not {plain[line] for line in held} & {plain[line] for line in trained}
    assert len({plain[line] for line in trained}) == 25
    assert (trained, held) == split(prompts(texts), 15, 0, Path("p"))
    assert held != split(prompts(texts), 15, 1, Path("p"))[1]
    assert trained != sorted(trained), "a limit takes the first ones, which must be a fair sample"


def test_something_is_left_to_train_on() -> None:
    trained, held = split(prompts(["a", "b"]), 10, 0, Path("p"))
    assert len(trained) == len(held) == 1
    with pytest.raises(DataError, match="one prompt only"):
        split(prompts(["a", "A "]), 1, 0, Path("p"))


def test_records_keep_their_fields_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "a", "weight": 0.5}, {"id": "own", "prompt": "ü"}, {"prompt": "c", "tags": ["x"]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [json.loads(line) for line in record_lines(path, [3, 1, 2]).splitlines()]
    assert lines == [{**records[2], "id": "3"}, {**records[0], "id": "1"}, records[1]]
