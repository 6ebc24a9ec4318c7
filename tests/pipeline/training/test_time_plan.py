"""Estimates of time: a measurement on tiny models, and the arithmetic from there."""

from __future__ import annotations

import pytest

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.memory_plan import prompt_tokens
from tropd.pipeline.training.time_plan import (
    EVALUATIONS,
    EXTRAPOLATIONS,
    Amounts,
    Rates,
    estimate,
    measure_rates,
    rounded_duration,
    seconds_of_stages,
)

LOADING = {"teacher_loading": 7.0, "student_loading": 3.0}
RATES = Rates(100.0, 1000.0, 200.0, 500.0, (10, 20), stopped=True, **LOADING)


def config(text: str = "") -> Config:
    return parse_config(
        "[rollout]\nprompts_per_step = 4\nsamples_per_prompt = 2\nmax_tokens = 50\n[train]\nsteps = 3\n"
        + text
    ).config


def distances(prompts: int, length: int) -> float:
    """Of the teacher, and of the student before and after training."""
    read = prompts * (5 + length)
    of_student = prompts * length / 200 + read / 1000 + read / 1500
    return prompts * length / 100 + read / 1000 + 2 * of_student


def test_stages_take_what_their_tokens_take() -> None:
    asks = config('[objective.guidance.loss]\nestimator = "topk_fkl"\n')
    seconds = seconds_of_stages(asks, RATES, Amounts(prompts=40, problems=6, prompt_length=5.0))
    assert seconds["generate-prefixes"] == 7 + 40 * 15 / 100
    assert seconds["score-teacher"] == 7 + 40 * 20 / 1000
    assert seconds["a step"] == pytest.approx(8 * (15 / 200 + 20 / 500 + 20 / 1000))
    assert seconds["train"] == 10 + 3 * seconds["a step"]
    assert seconds["evaluate"] == pytest.approx(
        19 + 12 * 15 * (1 / 200 + 1 / 200 + 1 / 100) + distances(6, 15)
    )


def test_stages_without_use_take_no_time() -> None:
    amounts = Amounts(prompts=40, problems=6, prompt_length=5.0)
    assert list(seconds_of_stages(config(), RATES, amounts)) == [
        "generate-prefixes",
        "a step",
        "train",
        "evaluate",
    ]
    assert "generate-prefixes" not in seconds_of_stages(config('[objective]\nname = "opd"\n'), RATES, amounts)
    imitates = seconds_of_stages(config('[objective]\nname = "sft"\n'), RATES, amounts)
    assert imitates["train"] == 3 + 3 * imitates["a step"], "without the teacher"
    alone = seconds_of_stages(config("[evaluation]\ndistance_prompts = 0\n"), RATES, amounts)
    assert alone["evaluate"] == pytest.approx(7 + 2 * 3 + 12 * 15 * (1 / 200 + 1 / 200 + 1 / 100))


def test_limits_count_and_what_was_cut_is_taken_as_long() -> None:
    limited = config("[prefixes]\nlimit = 10\nsamples_per_prompt = 2\n[evaluation]\nlimit = 3\nsamples = 2\n")
    cut = Rates(100.0, 1000.0, 200.0, 500.0, (20, 20), stopped=False, **LOADING)
    seconds = seconds_of_stages(limited, cut, Amounts(40, 6, 5.0))
    assert seconds["generate-prefixes"] == 7 + 20 * 50 / 100
    assert seconds["evaluate"] == pytest.approx(19 + 9 * 50 * 0.02 + distances(3, 50))


def test_evaluations_while_training_are_a_part_of_it() -> None:
    text = "evaluate_every = 2\nevaluate_problems = 5\n[evaluation]\ndistance_prompts = 4\n"
    amounts = Amounts(prompts=40, problems=6, prompt_length=5.0)
    seconds = seconds_of_stages(config(text), RATES, amounts)
    before = 4 * 15 / 100 + 4 * 20 / 1000
    each = (4 + 2 * 5) * 15 / 200 + 4 * 20 / 1000 + 4 * 20 / 1500
    assert seconds[EVALUATIONS] == pytest.approx(before + 2 * each)  # after the steps 2 and 3
    assert seconds["train"] == pytest.approx(10 + 3 * seconds["a step"] + seconds[EVALUATIONS])
    few = seconds_of_stages(config(text), RATES, Amounts(prompts=40, problems=3, prompt_length=5.0))
    each = (3 + 2 * 3) * 15 / 200 + 3 * 20 / 1000 + 3 * 20 / 1500
    assert few[EVALUATIONS] == pytest.approx(3 * 15 / 100 + 3 * 20 / 1000 + 2 * each)
    ungraded = seconds_of_stages(config(f'{text}[data]\nanswer_field = ""\n'), RATES, amounts)
    assert seconds[EVALUATIONS] - ungraded[EVALUATIONS] == pytest.approx(2 * 2 * 5 * 15 / 200)


@pytest.mark.parametrize(
    ("settings", "of_one"),
    [
        ("most = 4", 15 / 200),
        ("most = 9, score = 'reverse_kl'", 15 / 200 + 20 / 1000),
        ("most = 9, problems = 'other'", 12 / 200),
    ],
)
def test_extrapolations_are_a_part_of_training_too(settings: str, of_one: float) -> None:
    text = (
        f"[objective]\nname = 'effopd'\nextrapolation = {{ attempts = 3, {settings} }}\n"
        "[[evaluation.benchmarks]]\nname = 'other'\nproblems = 'p'\nmax_tokens = 12\n"
    )
    seconds = seconds_of_stages(config(text), RATES, Amounts(prompts=40, problems=6, prompt_length=5.0))
    scored = 9 if "other" in settings else min(6, int(settings.removeprefix("most = ")[0]))
    assert seconds[EXTRAPOLATIONS] == pytest.approx(2 * 4 * scored * of_one)  # after the steps 1 and 2
    assert seconds["train"] == pytest.approx(10 + 3 * seconds["a step"] + seconds[EXTRAPOLATIONS])


def test_a_measurement_of_tiny_models(tiny_run: Run) -> None:
    prompts = prompt_tokens(tiny_run)
    assert len(prompts) == 10
    rates = measure_rates(tiny_run, prompts)
    # Teacher and student are the same model.
    assert rates.teacher_sampling == rates.student_sampling > 0
    assert rates.teacher_scoring == 3 * rates.student_training
    assert len(rates.lengths) == 8
    assert min(rates.teacher_loading, rates.student_loading) > 0
    seconds = estimate(tiny_run, prompts)
    assert all(value > 0 for value in seconds.values())
    there = {path.name for path in tiny_run.workspace.root.iterdir()}
    assert there == {"config.toml", "data", "workspace.json"}, "nothing is written"


def test_durations_are_short() -> None:
    assert [rounded_duration(s) for s in (0.123, 12.3, 250, 7200)] == ["0.12 s", "12 s", "4 min", "2.0 h"]
