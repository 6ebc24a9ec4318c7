"""The embedded task: its solver against an evaluator of its own, chains with mistakes, fair sets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.demo.task import (
    MAX_ANSWER_SHARE,
    OPERATIONS,
    Problem,
    answer,
    draw_problem,
    draw_set,
    draw_training_problem,
    write_chain,
)
from tropd.pipeline.evaluation.grading import is_correct
from tropd.storage.errors import ConfigError

ANSWER_PATTERN = r"#\s*([^\s#]+)\s*$"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 8))
    digits = draw(st.lists(st.integers(0, 9), min_size=count + 1, max_size=count + 1))
    operations = draw(st.text(OPERATIONS, min_size=count, max_size=count))
    return Problem(tuple(digits), operations)


def evaluated(prompt: str) -> str:
    """The answer to a prompt by Python's own arithmetic: brackets from the left, one remainder at the end."""
    expression = prompt.removesuffix("=")
    nested = expression[0]
    for place in range(1, len(expression), 2):
        nested = f"({nested}{expression[place : place + 2]})"
    return str(eval(nested) % 10)


@given(problems())
def test_the_solver_agrees_with_an_independent_evaluator(problem: Problem) -> None:
    assert answer(problem) == evaluated(problem.prompt)


def test_the_example_of_the_documentation() -> None:
    problem = Problem((6, 4, 7, 4), "+*-")
    assert problem.prompt == "6+4*7-4="
    assert write_chain(problem).text == "6+4=0;0*7=0;0-4=6;#6"
    assert write_chain(problem, terse=True).text == "0;0;6;#6"


@given(problems())
def test_a_clean_chain_states_every_step_and_the_answer(problem: Problem) -> None:
    chain = write_chain(problem)
    *steps, last = chain.text.split(";")
    value = str(problem.digits[0])
    for step, operation, digit in zip(steps, problem.operations, problem.digits[1:], strict=True):
        left, result = step.split("=")
        assert left == f"{value}{operation}{digit}"
        assert result == evaluated(f"{left}=")
        value = result
    assert last == f"#{answer(problem)}"
    assert not any(chain.injected)
    assert is_correct(chain.text, answer(problem), ANSWER_PATTERN)


@given(problems())
def test_the_terse_format_states_the_results_of_the_chain(problem: Problem) -> None:
    *steps, last = write_chain(problem).text.split(";")
    terse = write_chain(problem, terse=True)
    assert terse.text.split(";") == [*(step.split("=")[1] for step in steps), last]
    assert len(terse.injected) == len(terse.text)


@given(problems(), st.sampled_from([0.13, 0.5, 1.0]), st.integers(0, 2**32), st.booleans())
def test_the_mask_marks_exactly_the_wrong_results_and_the_chain_goes_on_from_them(
    problem: Problem, noise: float, seed: int, terse: bool
) -> None:
    chain = write_chain(problem, terse=terse, noise=noise, generator=np.random.default_rng(seed))
    assert len(chain.injected) == len(chain.text)
    marked, position = set(np.flatnonzero(chain.injected)), 0
    *steps, last = chain.text.split(";")
    value = str(problem.digits[0])
    for step, operation, digit in zip(steps, problem.operations, problem.digits[1:], strict=True):
        result = step[-1]
        if not terse:
            assert step[:-1] == f"{value}{operation}{digit}="
        place = position + len(step) - 1
        assert (result != evaluated(f"{value}{operation}{digit}=")) == (place in marked)
        marked.discard(place)
        position += len(step) + 1
        value = result
    assert last == f"#{value}"
    assert not marked


def test_the_rate_of_mistakes_is_the_one_asked_for() -> None:
    generator = np.random.default_rng(0)
    wrong = total = 0
    for _ in range(2000):
        problem = draw_problem(generator, 3, 8)
        wrong += sum(write_chain(problem, noise=0.13, generator=generator).injected)
        total += len(problem.operations)
    assert wrong / total == pytest.approx(0.13, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([25, 32, 64, 100, 500]), st.booleans())
def test_no_constant_answer_scores_well(seed: int, count: int, held_out: bool) -> None:
    drawn = draw_set(seed, count, 3, 5, held_out=held_out)
    assert len({p.prompt for p in drawn}) == count
    assert all(p.held_out == held_out for p in drawn)
    assert all(3 <= len(p.operations) <= 5 for p in drawn)
    most = Counter(answer(p) for p in drawn).most_common(1)[0][1]
    # Ten digits cannot share a small set evenly: there, one more than a tenth is as good as it gets.
    assert most <= max(MAX_ANSWER_SHARE * count, -(-count // 10))
    assert most / count <= 0.125


def test_the_sets_of_the_demo_are_fair_and_disjoint() -> None:
    training = draw_set(0, 2000, 3, 5, held_out=False)
    held_out = draw_set(1, 500, 3, 5, held_out=True)
    for drawn in (training, held_out):
        assert Counter(answer(p) for p in drawn).most_common(1)[0][1] / len(drawn) <= 0.12
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}


def test_what_models_are_trained_on_is_never_held_out() -> None:
    generator = np.random.default_rng(0)
    held_out = {p.prompt for p in draw_set(0, 500, 3, 5, held_out=True)}
    for _ in range(3000):
        problem = draw_training_problem(generator, 3, 8)
        assert not problem.held_out
        assert problem.prompt not in held_out


def test_a_set_is_a_function_of_its_seed() -> None:
    assert draw_set(3, 50, 3, 5, held_out=True) == draw_set(3, 50, 3, 5, held_out=True)
    assert draw_set(3, 50, 3, 5, held_out=True) != draw_set(4, 50, 3, 5, held_out=True)


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot draw 400 different problems with 1 to 1 operations"):
        draw_set(0, 400, 1, 1, held_out=False)
