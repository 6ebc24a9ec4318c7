"""Predicted steps agree with a reckoning by hand, and the events of a step are in the right order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_node import STUDENT, TEACHER, paper_needs

from tropd.pipeline.training.preflight.rates import load_rates
from tropd.pipeline.training.preflight.stage_time import scoring_hours, training_hours, writing_hours
from tropd.pipeline.training.preflight.step_time import (
    NodeLayout,
    StepTime,
    StepWork,
    decode_seconds,
    predict,
)

ROOT = Path(__file__).parents[4]
PAPER = StepWork(prompt=200, lengths=(8096,) * 512)
# Two batches of rollouts in each process; the teacher is asked when both are written, as it was then.
SERVED = NodeLayout(trainers=7, student="transformers", servers=1, batch_size=51, asks_early=False)
REFERENCE = NodeLayout(
    trainers=8, student="vllm", servers=0, masks=False, micro_batch_tokens=33_000, is_reference=True
)
# Reckoned by hand for the same models and rates, when the teacher still had masks: seconds of a step.
BY_HAND = {
    "seven trainers, one server": (SERVED, PAPER, 927),
    "the same, one batch of rollouts": (replace(SERVED, batch_size=80), PAPER, 715),
    "one GPU": (NodeLayout(trainers=1, student="transformers", servers=0, batch_size=51), PAPER, 3600),
    "colocated reference": (REFERENCE, PAPER, 111),
    "seven and one, half of each response a prefix": (SERVED, replace(PAPER, own=0.5), 645),
    "reference, half of each response a prefix": (REFERENCE, replace(PAPER, own=0.5), 88),
}


def step(layout: NodeLayout, work: StepWork = PAPER) -> StepTime:
    return predict(layout, work, STUDENT, TEACHER, load_rates())


@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_takes_what_it_takes_by_hand(name: str) -> None:
    layout, work, expected = BY_HAND[name]
    assert step(layout, work).total == pytest.approx(expected, rel=0.15)


def test_gpu_hours_of_a_row_agree_with_those_by_hand() -> None:
    assert step(SERVED).gpu_hours(200, 8) == pytest.approx(412, rel=0.25)
    assert step(REFERENCE).gpu_hours(200, 8) == pytest.approx(49, rel=0.25)
    url = 'teacher.url="http://node:8400"'
    assert training_hours(
        paper_needs(7, "student.engine=transformers", "rollout.batch_size=51", url)
    ) == pytest.approx(412, rel=0.25)


def test_one_teacher_answers_one_after_another_and_many_at_once() -> None:
    everywhere = NodeLayout(trainers=8, student="vllm", servers=0)
    first = replace(everywhere, everywhere=False)
    assert step(first).teacher == pytest.approx(8 * step(everywhere).teacher, rel=1e-6)
    two = replace(everywhere, trainers=6, servers=2)
    assert step(two).teacher == pytest.approx(4 * step(everywhere).teacher, rel=0.02)


def test_a_server_works_while_rows_of_other_lengths_are_written() -> None:
    tail = StepWork(prompt=200, lengths=(2000,) * 448 + (8096,) * 64)
    early = NodeLayout(trainers=6, student="vllm", servers=2)
    late = replace(early, asks_early=False)
    assert step(early, tail).rollout == step(late, tail).rollout
    # When the longest rows end, all others are answered: 65 % of the tokens.
    assert step(early, tail).teacher < 0.4 * step(late, tail).teacher
    assert step(early).teacher == pytest.approx(step(late).teacher)  # all end together
    beside = NodeLayout(trainers=8, student="vllm", servers=0)
    assert step(beside, tail) == step(replace(beside, asks_early=False), tail)


def test_without_a_teacher_nothing_waits_for_it() -> None:
    assert predict(REFERENCE, PAPER, STUDENT, None, load_rates()).teacher == 0


def test_masks_and_short_lines_cost_time() -> None:
    plain = NodeLayout(trainers=8, student="vllm", servers=0, masks=False, micro_batch_tokens=33_000)
    assert step(replace(plain, masks=True)).train > 1.5 * step(plain).train
    assert step(replace(plain, micro_batch_tokens=8000)).train > step(plain).train


def test_a_batch_lasts_as_long_as_its_longest_row() -> None:
    rates = load_rates()
    long, short = StepWork(10, (1000,) * 8), StepWork(10, (1000,) + (10,) * 7)
    for engine in ("vllm", "transformers"):
        layout = NodeLayout(trainers=1, student=engine, servers=0)
        whole, few = (decode_seconds(layout, work, STUDENT, rates)[0] for work in (long, short))
        overhead = rates.vllm_token if engine == "vllm" else rates.transformers_token
        assert 1000 * overhead.value < few < whole


def test_more_rows_than_fit_are_written_in_equal_batches() -> None:
    layout = NodeLayout(trainers=1, student="transformers", servers=0, batch_size=64)
    rates = load_rates()
    one, two = (decode_seconds(layout, StepWork(10, (100,) * n), STUDENT, rates)[0] for n in (64, 74))
    # 64 + 10 would take as many steps, but the second batch hardly less than a whole one.
    assert one < two < 2 * one
    assert decode_seconds(layout, StepWork(10, ()), STUDENT, rates) == (0.0, 0.0)


def test_scoring_in_vllm_passes_twice_and_counts_numbers() -> None:
    plain = NodeLayout(trainers=8, student="vllm", servers=0)
    in_vllm = replace(plain, scorer="vllm")
    assert step(in_vllm).teacher == pytest.approx(step(plain).teacher)
    asked = replace(PAPER, alternatives=True)
    assert step(in_vllm, asked).teacher > 2 * step(plain, asked).teacher


def test_the_earlier_stages_take_time_in_proportion() -> None:
    needs = paper_needs(8)
    once, twice = (
        writing_hours(needs, TEACHER, "vllm", responses=n, length=8096, batch_size=64) for n in (3200, 6400)
    )
    assert 1.9 < twice / once < 2.1
    # A forward pass over 25,600 trajectories of 7B: 2 N tokens / rate, and attention.
    assert scoring_hours(needs, responses=25_600, length=8096) == pytest.approx(2.4, rel=0.1)


@pytest.fixture
def bench_node(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import bench_node

    return bench_node


def test_the_documented_prediction_is_what_the_simulation_says(bench_node: Any) -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    for line in bench_node.lines(load_rates(), 8, 5500):
        assert line in text, line


def test_a_colocated_node_comes_near_the_reference(bench_node: Any) -> None:
    found = {name: step(layout) for name, layout in bench_node.layouts(8).items()}
    best, reference = found["vLLM students, teacher everywhere"], found["reference, colocated"]
    assert best.total <= 130
    assert reference.total == pytest.approx(111, rel=0.05)
    assert best.busy >= 0.6
