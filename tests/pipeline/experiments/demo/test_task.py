"""The embedded task: arithmetic, injected errors, balance, and what is held out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tropd.pipeline.config.sections.evaluation_settings import DemoConfig, EvaluationConfig
from tropd.pipeline.experiments.demo.task import (
    Problem,
    answer,
    apply,
    draw_set,
    draw_training_problem,
    write_chain,
)
from tropd.pipeline.experiments.demo.tiny_models import padded_batch, train_student
from tropd.pipeline.experiments.demo.tokenizer import EOS_ID, encode_text, make_tokenizer
from tropd.pipeline.problems.grading.grading import extract, grade
from tropd.storage.errors import ConfigError

problems = st.integers(1, 8).flatmap(
    lambda n: st.builds(
        Problem,
        st.tuples(*[st.integers(0, 9)] * (n + 1)),
        st.text(alphabet="+-*", min_size=n, max_size=n),
    )
)
PATTERN = EvaluationConfig().answer_pattern


@given(problems)
def test_answers_agree_with_an_independent_evaluator(problem: Problem) -> None:
    nested = str(problem.digits[0])
    for operation, digit in zip(problem.operations, problem.digits[1:], strict=True):
        nested = f"({nested}{operation}{digit})"
    assert answer(problem) == str(eval(nested) % 10)  # modulo is a ring homomorphism
    assert re.fullmatch(r"\d([+*-]\d)+=", problem.prompt)


@given(problems)
def test_clean_and_terse_chains_end_with_the_answer(problem: Problem) -> None:
    for terse in (False, True):
        chain = write_chain(problem, terse=terse)
        (mark,) = grade([chain.text], [answer(problem)], EvaluationConfig(grader="pattern"))
        assert mark.correct
        assert not any(chain.injected)
        assert len(chain.injected) == len(chain.text)
    assert re.fullmatch(r"(\d;)+#\d", write_chain(problem, terse=True).text)


@given(problems, st.integers(0, 1000))
def test_injected_errors_are_marked_and_the_chain_goes_on_from_them(problem: Problem, seed: int) -> None:
    chain = write_chain(problem, noise=0.5, generator=np.random.default_rng(seed))
    steps = chain.text.split("#")[0].rstrip(";").split(";")
    value, position = problem.digits[0], 0
    for step, operation, digit in zip(steps, problem.operations, problem.digits[1:], strict=True):
        left, result = step.split("=")
        assert left == f"{value}{operation}{digit}"
        wrong = int(result) != apply(value, operation, digit)
        assert chain.injected[position + len(step) - 1] == wrong
        assert sum(chain.injected[position : position + len(step) + 1]) == wrong
        value, position = int(result), position + len(step) + 1
    assert extract("pattern", chain.text, PATTERN) == str(value)


@pytest.mark.parametrize(("count", "held_out"), [(2000, False), (500, True)])
def test_no_constant_answer_scores_above_twelve_percent(count: int, held_out: bool) -> None:
    config = DemoConfig()
    drawn = draw_set(1, count, config.min_operations, config.max_operations, held_out=held_out)
    assert len({p.prompt for p in drawn}) == count
    assert max(Counter(answer(p) for p in drawn).values()) / count <= 0.12
    assert all(p.held_out == held_out for p in drawn)
    assert drawn == draw_set(1, count, config.min_operations, config.max_operations, held_out=held_out)


def test_nothing_that_is_trained_on_is_held_out() -> None:
    generator = np.random.default_rng(0)
    assert not any(draw_training_problem(generator, 3, 5).held_out for _ in range(500))


def test_too_many_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot draw 5000 different"):
        draw_set(0, 5000, 1, 1, held_out=False)


def test_the_tokenizer_is_an_ordinary_one(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "6+4*7-4=6+4=0;0*7=0;0-4=6;#6"
    assert tokenizer(text)["input_ids"] == encode_text(text)
    assert tokenizer.decode([*encode_text(text), EOS_ID], skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == EOS_ID


def test_the_loss_skips_prompts_padding_and_injected_digits() -> None:
    problem = Problem((6, 4, 7), "+*")
    chain = write_chain(problem, noise=1.0, generator=np.random.default_rng(0))
    ids, labels = padded_batch(
        [(problem, chain, True), (Problem((1, 2), "+"), write_chain(Problem((1, 2), "+")), False)]
    )
    prompt = len(problem.prompt)
    response = labels[0, prompt:].tolist()
    expected = [-100 if bad else t for t, bad in zip(encode_text(chain.text), chain.injected, strict=True)]
    assert response == [*expected, EOS_ID]
    assert (labels[0, :prompt] == -100).all()
    assert labels[1, -1] == -100
    assert ids[1, 4:].tolist()[: len("1+2=3;#3")] == encode_text("1+2=3;#3")


@settings(max_examples=2, deadline=None)
@given(st.sampled_from(["noisy", "terse"]))
def test_training_is_a_function_of_its_seed(spoil: str) -> None:
    config = DemoConfig(student_steps=3, spoil_steps=2, spoil=spoil)
    losses: list[list[float]] = [[], [], []]
    models = [train_student(config, seed, losses[i].append) for i, seed in enumerate((1, 1, 2))]
    assert losses[0] == losses[1] != losses[2]
    assert all((a == b).all() for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
