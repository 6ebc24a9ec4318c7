"""Fields of prompts and answers are found, or asked for; answers say how they are graded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.experiments.starting.fields import (
    answers_of,
    find_fields,
    grading_in,
    grading_of,
    sample_records,
)
from tropd.storage.errors import ConfigError, DataError

HERE = Path("prompts.jsonl")
TURNS = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("record", "prompt", "answer", "others"),
    [
        ({"prompt": "1+1", "answer": 2}, "prompt", "answer", ()),
        ({"question": "1+1", "solution": "2", "difficulty": 3}, "question", "solution", ()),
        ({"problem": "1+1", "final_answer": "2", "solution": "so 2"}, "problem", "final_answer", ()),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "instruction", "output", ("input",)),
        ({"messages": TURNS}, "messages", None, ()),
        ({"prompt": TURNS, "text": "Why?"}, "prompt", None, ("text",)),
        ({"prompt": "1+1", "answer": None}, "prompt", None, ()),
        ({"prompt": "1+1", "answer": [1, 2]}, "prompt", None, ()),
    ],
)
def test_fields_are_found(
    record: dict[str, Any], prompt: str, answer: str | None, others: tuple[str, ...]
) -> None:
    found = find_fields(HERE, [record, record])
    assert (found.prompt, found.answer, found.others) == (prompt, answer, others)
    assert found.messages == isinstance(record[prompt], list)


def test_given_fields_are_taken_and_have_to_be_there() -> None:
    records = [{"q": {"text": "1+1"}, "prompt": "x", "a": "2"}]
    found = find_fields(HERE, records, "q.text", "a")
    assert (found.prompt, found.answer, found.others) == ("q.text", "a", ("prompt",))
    with pytest.raises(ConfigError, match=r"no record has the field 'z' of --answer-field") as caught:
        find_fields(HERE, records, None, "z")
    assert "a, prompt, q" in str(caught.value.hint)


def test_a_prompt_that_some_records_lack_is_none() -> None:
    with pytest.raises(ConfigError, match="no field looks like the prompt of most records") as caught:
        find_fields(HERE, [{"prompt": "x"}, {"prompt": ""}, {"else": 1}])
    assert "--prompt-field" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("answers", "grader"),
    [
        (["2", "-3.5", "1,000", "3/4", "50%", "$7", "1e-3"], "math"),
        ([r"\frac{1}{2}", "$x^2$", r"\boxed{3}", "12"], "math"),
        (["We add 1 and 1.\n#### 2", "So it is\n#### 1,200"], "math"),
        (["A", "(B)", "C.", "J"], "choice"),
        (["Paris", "blue", "the sea"], "exact"),
        (["x", "Y", "12"], "exact"),
        (["It is a long story that nobody would ever tell in the same words."] * 3, None),
        ([], None),
    ],
)
def test_answers_choose_the_grader(answers: list[str], grader: str | None) -> None:
    assert grading_of(answers).grader == grader


def test_a_few_odd_answers_change_nothing() -> None:
    assert grading_of(["2"] * 19 + ["no solution"]).grader == "math"


def test_answers_are_those_that_are_there() -> None:
    assert answers_of([{"a": 1}, {"a": None}, {}, {"a": " x "}], "a") == ["1", "x"]
    assert answers_of([{"a": 1}], None) == []


def test_a_file_without_records_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        sample_records(path)
    path.write_text("not json\n")
    with pytest.raises(DataError, match="no records that can be used: line 1 "):
        sample_records(path)
    path.write_text("not json\n" + json.dumps({"prompt": "x"}))
    assert sample_records(path) == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("record", "grader"),
    [
        ({"question": "2+2?", "choices": ["3", "4"], "answer": 1}, None),
        ({"question": "2+2?", "options": ["3", "4"], "answer": "B"}, None),
        ({"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}, None),
        ({"question": "2+2? A. 3 B. 4", "choices": ["3", "4"], "answer": "B"}, "choice"),
        ({"question": "2+2?", "choices": ["3", "4"], "answer": "4"}, "math"),
        ({"question": "2+2?", "choices": None, "answer": 4}, "math"),
        ({"question": "2+2?", "options": {"A": "3", "B": "4"}, "answer": "B"}, None),
        ({"question": "2+2?", "options": ["3", "4"], "answer": "4.0"}, "math"),
        ({"question": "2+2?", "choices": ["$3$", "$4$"], "answer": "4"}, "math"),
        ({"question": "Of France?", "choices": ["rome", "paris"], "answer": "Paris"}, "exact"),
        ({"question": "2+2?", "choices": []}, None),
    ],
)
def test_choices_that_the_prompt_does_not_show_are_not_graded(
    record: dict[str, Any], grader: str | None
) -> None:
    records = [record] * 3
    grading = grading_in(records, find_fields(HERE, records))
    assert grading.grader == grader
    assert ("which the prompts do not show" in grading.reason) == (grader is None and "ans" in str(record))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "What is 1+1?\nWhat is 1+2?\n", "a file of lines or tabs has to become one of these"),
        ("p.tsv", "prompt\tanswer\n1+1\t2\n", "a file of lines or tabs has to become one of these"),
        ("p.csv", "prompt;answer\n1+1;2\n", "seem to be separated by ';', not by commas"),
        ("q.csv", "prompt\tanswer\n1+1\t2\n", "seem to be separated by tabs, not by commas"),
    ],
)
def test_other_files_are_told_what_to_become(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        sample_records(tmp_path / name)
    assert says in f"{error.value} {error.value.hint}"
