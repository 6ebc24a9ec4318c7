"""Graders: pairs that were checked by hand, responses as models write them, and hostile ones."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from answer_pairs import CHOICES, HARD, PAIRS

from tropd.pipeline.config.sections.evaluation_settings import EvaluationConfig
from tropd.pipeline.problems.grading.choices import expected_choice, extract_choice
from tropd.pipeline.problems.grading.grading import check_expected, grade
from tropd.pipeline.problems.grading.math_answers import equal_at_once, expected_answer, extract_final_answer
from tropd.pipeline.problems.prompts import Prompt
from tropd.storage.errors import DataError

MATH = EvaluationConfig(grader="math", grading_seconds=20)
DATA = Path(__file__).parents[5] / "shared" / "data"


def marks(responses: list[str], expected: list[str | None], config: EvaluationConfig = MATH) -> list[bool]:
    return [mark.correct for mark in grade(responses, expected, config)]


def test_pairs_checked_by_hand() -> None:
    pairs = [*PAIRS, *HARD]
    found = marks([f"So \\boxed{{{answer}}}." for answer, _, _ in pairs], [wanted for _, wanted, _ in pairs])
    wrong = [pair for pair, same in zip(pairs, found, strict=True) if pair[2] != same]
    assert len(pairs) >= 500
    assert wrong == []


def test_what_is_plainly_unequal_is_so_from_both_sides() -> None:
    decided = [(a, b, equal_at_once(a, b), equal_at_once(b, a)) for a, b, same in [*PAIRS, *HARD] if not same]
    assert [pair for pair in decided if True in pair[2:]] == []


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Thus \\boxed{41}, no wait, \\boxed{42}.", "42"),
        ("The result is $\\boxed{\\frac{1}{2}}$ as claimed. There are 3 cases.", "\\frac{1}{2}"),
        ("\\boxed{\\text{A set } \\{1, 2\\}}", "\\text{A set } \\{1, 2\\}"),
        ("so \\boxed{7", None),
        ("I get \\boxed{5}. To check: \\boxed{", None),
        ("\\boxed{}", None),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("<think>\\boxed{9}", None),
        ("<think>The answer is 9.", None),
        ("<think>\\boxed{9}</think>", None),
        ("It is \\boxed{8}.<think>or \\boxed{9}?", "8"),
        ("We wait from 3:30 to 3:45", "3:45"),
        ("So there are 2^{10}", None),
        ("So there are 5!", None),
        ("The answer is 5!", "5!"),
        ("The answer is 5 apples!", "5 apples"),
        ("Five eggs.\n#### 18", "18"),
        ("#### 1,234\n", "1,234"),
        ("**Answer:** 42.", "42"),
        ("**Final Answer: 42**", "42"),
        ("The answer is 3.5.", "3.5"),
        ("Therefore, the final answer is $12$ dollars.", "12 dollars"),
        ("The answer is $12$ since 3 are left.", "12"),
        ("The answer is $x = 1$ or $x = 2$.", "$x = 1$ or $x = 2$"),
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
    assert extract_final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{125}. To see that", "125"),
        ("so \\boxed{12", None),
        ("The answer is 12", None),
        ("The answer is 12.\nTo see that", "12."),
        ("#### 12", None),
        ("#### 12\nand", "12"),
        ("We get 12", None),
        ("We get 12 apples", "12"),
    ],
)
def test_what_the_length_cut_off_is_no_answer(response: str, answer: str | None) -> None:
    found = extract_final_answer(response, cut_off=True)
    assert found == (answer and answer.rstrip("."))
    if answer is not None:
        (mark,) = grade([response], [answer.rstrip(".")], MATH, cut_off=[True])
        assert mark.correct


def test_the_other_graders_know_what_was_cut_off() -> None:
    def answer(response: str, **options: Any) -> str | None:
        return grade([response], ["B"], EvaluationConfig(**options), cut_off=[True])[0].answer

    assert answer("2+2=4#4", grader="pattern") is None
    assert answer("2+2=4#4 is", grader="pattern", answer_pattern=r"#(\d)") == "4"
    assert answer("yes", grader="exact") is None
    assert answer("The answer is B", grader="choice") is None
    assert answer("The answer is B.", grader="choice") == "B"


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


def test_the_declared_choice_wins() -> None:
    found = [(response, extract_choice(response)) for response, _ in CHOICES]
    assert found == CHOICES
    assert len(CHOICES) >= 90


@pytest.mark.parametrize(
    ("field", "letter"),
    [
        *(
            (text, "B")
            for text in ("B", "b", "(B)", "B.", "B)", " B ", "1", "1.0", "B) 42", "\\boxed{B}", "**B**")
        ),
        *((text, None) for text in ("42", "", "Apple", "-1", "The answer is B")),
    ],
)
def test_choices_as_data_sets_write_them(field: str, letter: str | None) -> None:
    assert expected_choice(field) == letter
    config = EvaluationConfig(grader="choice")
    assert marks(["The answer is B, not A."], [field], config) == [letter == "B"]
    problems = [Prompt(id="p1", text="", answer=None), Prompt(id="p2", text="", answer=field)]
    check_expected("math", problems)
    if letter is None:
        with pytest.raises(DataError, match=r"'p2'.*is not a choice"):
            check_expected("choice", problems)
    else:
        check_expected("choice", problems)


def test_pattern_and_exact() -> None:
    assert marks(["1+1=2#2", "3", "x#2 "], ["2", "3", "2"], EvaluationConfig(grader="pattern")) == [
        True,
        False,
        True,
    ]
    exact = EvaluationConfig(grader="exact")
    assert marks([" yes\n", "yes, sir"], ["yes", "yes"], exact) == [True, False]
    assert marks(["\\boxed{1}"], [None]) == [False]


def test_no_text_takes_long_or_raises() -> None:
    pieces = [
        "s/",
        "s ",
        "aa-",
        "5 cm/",
        "(",
        " ",
        "1,",
        "1:",
        "is ",
        "$",
        "\\text{",
        "A B ",
        "{",
        "\\frac",
        "^",
        "\n",
        "or ",
    ]
    started = time.monotonic()
    for piece in pieces:
        long = piece * 400
        equal_at_once(long[:400], "5 cm")
        equal_at_once("x", long[:400])
        for response in (long * 50, long[:399] + "5"):
            extract_final_answer(response)
            extract_choice(response)
    assert time.monotonic() - started < 20


NO_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the shared problem files are not beside the project ({DATA.name})"
)
FILES = [
    ("gsm8k/test.jsonl", "answer"),
    ("math/aime24.jsonl", "answer"),
    ("math/amc23.jsonl", "answer"),
    ("math/minerva.jsonl", "solution"),
]


def real_answers(file: str, field: str) -> list[str]:
    return [str(json.loads(line)[field]) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


@NO_DATA
@pytest.mark.parametrize(("file", "field"), FILES)
def test_real_answers_equal_themselves_however_they_are_written(file: str, field: str) -> None:
    responses, expected = [], []
    for gold in real_answers(file, field)[:300]:
        answer = expected_answer(gold)
        forms = [f"We find $\\boxed{{{answer}}}$.", f"Thus\n#### {answer}\n", f"**Answer:** \\({answer}\\)"]
        if "$" not in answer:
            forms.append(f"The answer is ${answer}$.")
        if re.fullmatch(r"-?[\d,]+", answer):
            number = int(answer.replace(",", ""))
            forms += [
                f"It is {number:,} in all.",
                f"The final answer is {number}.",
                f"The answer is {number} dollars.",
            ]
            forms += [
                f"\\boxed{{{form}}}"
                for form in (f"{number}.0", f"\\text{{{number} apples}}", f"x = {number}")
            ]
        responses += forms
        expected += [gold] * len(forms)
    found = marks(responses, list(expected))
    assert [response for response, same in zip(responses, found, strict=True) if not same] == []


@NO_DATA
@pytest.mark.parametrize(("file", "field"), FILES)
def test_real_answers_are_not_their_neighbours(file: str, field: str) -> None:
    gold = real_answers(file, field)[:60]
    plain = [expected_answer(text) for text in gold]
    shifted = plain[1:] + plain[:1]
    neighbours = marks([f"\\boxed{{{answer}}}" for answer in shifted], list(gold))
    for own, other, same in zip(plain, shifted, neighbours, strict=True):
        if same:
            assert expected_answer(own).strip("$0. ") == other.strip("$0. "), (own, other)
