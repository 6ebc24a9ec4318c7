"""Graders: pairs that were checked by hand, responses as models write them, and hostile ones."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from answer_pairs import PAIRS

from tropd.pipeline.config import EvaluationConfig
from tropd.pipeline.evaluation.grading import grade
from tropd.pipeline.evaluation.math_answers import expected_answer, extract_final_answer

MATH = EvaluationConfig(grader="math", grading_seconds=20)
DATA = Path(__file__).parents[4] / "shared" / "data"


def marks(responses: list[str], expected: list[str | None], config: EvaluationConfig = MATH) -> list[bool]:
    return [mark.correct for mark in grade(responses, expected, config)]


def test_pairs_checked_by_hand() -> None:
    found = marks([f"So \\boxed{{{answer}}}." for answer, _, _ in PAIRS], [wanted for _, wanted, _ in PAIRS])
    wrong = [pair for pair, same in zip(PAIRS, found, strict=True) if pair[2] != same]
    assert len(PAIRS) >= 100
    assert wrong == []


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Thus \\boxed{41}, no wait, \\boxed{42}.", "42"),
        ("The result is $\\boxed{\\frac{1}{2}}$ as claimed. There are 3 cases.", "\\frac{1}{2}"),
        ("\\boxed{\\text{A set } \\{1, 2\\}}", "\\text{A set } \\{1, 2\\}"),
        ("so \\boxed{7", None),
        ("Five eggs.\n#### 18", "18"),
        ("#### 1,234\n", "1,234"),
        ("**Answer:** 42.", "42"),
        ("**Final Answer: 42**", "42"),
        ("The answer is 3.5.", "3.5"),
        ("Therefore, the final answer is $12$ dollars.", "12"),
        ("The answer is: \\frac{3}{4} because 3 of 4 remain", "\\frac{3}{4}"),
        ("<think>\\boxed{9}</think>It is \\boxed{10}.", "10"),
        ("<think>the answer is 9</think>We get 11 apples.", "11"),
        ("First 12, then 15 and at last 1,200 dollars", "1,200"),
        ("It costs -5 degrees", "-5"),
        ("I do not know.", None),
        ("", None),
        ("\\fbox{8}", "8"),
        ("\\boxed 5 is it", "5"),
    ],
)
def test_where_the_final_answer_is(response: str, answer: str | None) -> None:
    assert extract_final_answer(response) == (answer if answer is not None or "7" not in response else "7")


def test_worked_solutions_as_expected_answers() -> None:
    assert expected_answer("2+2=<<2+2=4>>4\n#### 4") == "4"
    assert expected_answer(" \\frac{1}{2} ") == "\\frac{1}{2}"
    assert marks(["The answer is 4."], ["Two and two.\n#### 4"]) == [True]


def test_hostile_answers_end_in_time_and_are_wrong() -> None:
    hostile = [
        "\\boxed{" + "9" * 5_000_000 + "}",
        "\\boxed{9^{9^{9^{9^{9}}}}}",
        "\\boxed{" + "(" * 150 + "1" + ")" * 150 + "}",
        "\\boxed{" + "\\frac{1}{" * 40 + "x" + "}" * 40 + "}",
        "\\boxed{10^{10^{10}} + 1}",
        "\\boxed{\\sum_{n=1}^{10^{12}} \\frac{1}{n^3}}",
        "\\boxed{__import__('os').system('touch /tmp/tropd-was-here')}",
        "\\boxed{\\int_0^1 \\sin(x^x^x^x)\\,dx}",
        "\\boxed{(x+y+z)^{300}}",
        "\\boxed{" * 100_000,
        "\x00\ud800",
        "1" * 1_000_000 + "/" + "3" * 1_000_000,
    ]
    config = EvaluationConfig(grader="math", grading_seconds=1)
    started = time.monotonic()
    assert marks(hostile, ["7 + x"] * len(hostile), config) == [False] * len(hostile)
    assert time.monotonic() - started < 60
    assert not Path("/tmp/tropd-was-here").exists()
    assert marks(["\\boxed{x+1}"], ["1+x"]) == [True]  # the workers are alive, or alive again


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("**Answer:** D", "D"),
        ("\\boxed{\\text{A}}", "A"),
        ("I think A is wrong, so the correct choice is (B)", "B"),
        ("C", "C"),
        ("<think>The answer is A</think>The answer is D", "D"),
        ("no letter", None),
    ],
)
def test_choices(response: str, letter: str | None) -> None:
    config = EvaluationConfig(grader="choice")
    (mark,) = grade([response], ["C"], config)
    assert (mark.answer, mark.correct) == (letter, letter == "C")
    assert marks([response], ["(C)"], config) == [letter == "C"]


def test_pattern_and_exact() -> None:
    assert marks(["1+1=2#2", "3", "x#2 "], ["2", "3", "2"], EvaluationConfig()) == [True, False, True]
    exact = EvaluationConfig(grader="exact")
    assert marks([" yes\n", "yes, sir"], ["yes", "yes"], exact) == [True, False]
    assert marks(["\\boxed{1}"], [None]) == [False]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared problem files are not beside the project")
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("gsm8k/test.jsonl", "answer"),
        ("math/aime24.jsonl", "answer"),
        ("math/amc23.jsonl", "answer"),
        ("math/minerva.jsonl", "solution"),
    ],
)
def test_real_answers_equal_themselves_and_not_their_neighbours(file: str, field: str) -> None:
    records = [json.loads(line) for line in (DATA / file).read_text().splitlines()][:60]
    gold = [str(record[field]) for record in records]
    plain = [expected_answer(text) for text in gold]
    assert all(marks([f"We find $\\boxed{{{answer}}}$." for answer in plain], list(gold)))
    shifted = plain[1:] + plain[:1]
    neighbours = marks([f"\\boxed{{{answer}}}" for answer in shifted], list(gold))
    for own, other, same in zip(plain, shifted, neighbours, strict=True):
        if same:
            assert expected_answer(own).strip("$0. ") == other.strip("$0. "), (own, other)
