"""Advantages of groups, margins and perplexity weights against loops over rows, in float64; and identities of methods."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.config.problems import unusual
from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.objectives.loss import TokenBatch, floored_log_ratio, plan_step, region_losses
from tropd.pipeline.objectives.needs import learns_by_comparison_alone, teacher_needs
from tropd.pipeline.objectives.objective import Objective, needs_rewards
from tropd.pipeline.objectives.partition import partition_tokens
from tropd.pipeline.objectives.rewards.advantages import (
    StepRewards,
    dual_perplexity,
    group_advantages,
    margin_shifts,
    process_advantages,
)
from tropd.pipeline.objectives.token_weights import TokenStatistics
from tropd.storage.errors import ConfigError

# Three prompts: two mixed ones, of which one has a row without tokens, and one whose rows are all wrong.
GROUPS = [0, 0, 0, 0, 1, 1, 1, 2, 2]
REWARDS = [1.0, 0.0, 0.25, 1.0, 0.5, -1.0, math.nan, 0.0, 0.0]
LENGTHS = [3, 2, 4, 1, 2, 3, 0, 2, 2]
ROWS = [row for row, length in enumerate(LENGTHS) for _ in range(length)]
TOKENS = len(ROWS)
_random = np.random.Generator(np.random.PCG64(7))
STUDENT = np.log(_random.uniform(0.05, 0.95, TOKENS)).astype(np.float32)
TEACHER = np.log(_random.uniform(0.02, 0.95, TOKENS)).astype(np.float32)
A = [float(t) - float(s) for t, s in zip(TEACHER, STUDENT, strict=True)]


def rewards(values: list[float] = REWARDS, tokens: list[float] | None = None) -> StepRewards:
    array = np.array(values)
    return StepRewards(
        array,
        np.array(GROUPS),
        np.nan_to_num(array, nan=-np.inf) >= 0.5,
        None if tokens is None else np.array(tokens),
    )


def of_group(group: int) -> list[int]:
    return [r for r in range(len(GROUPS)) if GROUPS[r] == group and not math.isnan(REWARDS[r])]


def naive_advantage(row: int, standardize: bool) -> float:
    if math.isnan(REWARDS[row]):
        return 0.0
    own = [REWARDS[r] for r in of_group(GROUPS[row])]
    difference = REWARDS[row] - mean(own)
    return difference / (stdev(own) + 1e-6) if standardize else difference


def naive_row_mean(row: int) -> float:
    return mean(a for a, r in zip(A, ROWS, strict=True) if r == row)


def naive_shift(row: int, margin: float) -> float:
    own = of_group(GROUPS[row])
    right = [naive_row_mean(r) for r in own if REWARDS[r] >= 0.5]
    wrong = [naive_row_mean(r) for r in own if REWARDS[r] < 0.5]
    if not right or not wrong or row not in own:
        return 0.0
    short = max(0.0, margin - (mean(right) - mean(wrong)))
    return short / 2 if REWARDS[row] >= 0.5 else -short / 2


def naive_weight(row: int, temperature: float) -> float:
    """PPL^(±1/τ) of the row over the mean of those rows of the prompt that are as right or wrong."""

    def power(r: int) -> float:
        right = REWARDS[r] >= 0.5
        logprobs = STUDENT if right else TEACHER
        perplexity = math.exp(-mean(float(p) for p, owner in zip(logprobs, ROWS, strict=True) if owner == r))
        return perplexity ** ((1 if right else -1) / temperature)

    if math.isnan(REWARDS[row]):
        return 1.0
    alike = [r for r in of_group(GROUPS[row]) if (REWARDS[r] >= 0.5) == (REWARDS[row] >= 0.5)]
    return power(row) / mean(power(r) for r in alike)


@pytest.mark.parametrize("standardize", [True, False])
def test_group_advantages_are_those_of_a_loop(standardize: bool) -> None:
    found = group_advantages(np.array(REWARDS), np.array(GROUPS), standardize=standardize)
    expected = [naive_advantage(row, standardize) for row in range(len(GROUPS))]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_group_of_one_row_or_without_spread_has_advantage_zero() -> None:
    values = np.array([0.1 + 0.2, 0.3, 0.3, 5.0, np.nan])
    groups = np.array([0, 1, 1, 2, 2])
    assert group_advantages(values, groups, standardize=True).tolist() == [0.0] * 5


def test_rewards_of_tokens_add_up_from_the_token_on() -> None:
    given = [1.0, math.nan, 0.0, 0.5, math.nan, *[math.nan] * (TOKENS - 7), -1.0, 2.0]
    groups = [GROUPS[row] for row in ROWS]
    found = process_advantages(np.array(given), np.array(ROWS), np.array(groups), standardize=True)

    def normalized(token: int) -> float:
        own = [given[t] for t in range(TOKENS) if groups[t] == groups[token] and not math.isnan(given[t])]
        spread = stdev(own) if len(own) > 1 else 0.0
        return 0.0 if math.isnan(given[token]) or not spread else (given[token] - mean(own)) / (spread + 1e-6)

    expected = [
        sum(normalized(later) for later in range(token, TOKENS) if ROWS[later] == ROWS[token])
        for token in range(TOKENS)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [0.01, 0.4, 5.0])
def test_margins_are_those_of_a_loop(margin: float) -> None:
    found = margin_shifts(np.array(A), np.array(ROWS), rewards(), margin)
    expected = [naive_shift(row, margin) for row in range(len(GROUPS))]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    shifted = np.array(A) + found[ROWS]
    again = margin_shifts(shifted, np.array(ROWS), rewards(), margin)
    np.testing.assert_allclose(again, 0.0, atol=1e-12)  # the margin holds now


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_perplexity_weights_are_those_of_a_loop(temperature: float) -> None:
    student, teacher = STUDENT.astype(np.float64), TEACHER.astype(np.float64)
    found = dual_perplexity(student, teacher, np.array(ROWS), rewards(), temperature)
    expected = [naive_weight(row, temperature) for row in range(len(GROUPS))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    uniform = dual_perplexity(student, teacher, np.array(ROWS), rewards(), 1e9)
    np.testing.assert_allclose(uniform, 1.0, atol=1e-8)


def loss_and_gradient(objective: Objective, given: StepRewards | None) -> tuple[float, list[float]]:
    """The loss of all tokens in one micro-batch, and its gradient in their log-probs, in float64."""
    asked = teacher_needs(objective).token_logprobs
    teacher = TEACHER if asked else np.full(TOKENS, np.nan, dtype=np.float32)
    rows = np.array(ROWS)
    regions = partition_tokens(
        objective.partition,
        student_logprobs=STUDENT,
        teacher_logprobs=teacher,
        correct=None if given is None else given.correct[rows],
    )
    statistics = TokenStatistics(
        rows, floored_log_ratio(teacher, STUDENT), student_logprobs=STUDENT.astype(np.float64), rewards=given
    )
    groups = (np.array(GROUPS) if given is None else given.groups)[rows]
    none = np.zeros(0, dtype=np.int64)
    plan = plan_step(objective, regions, statistics, groups=groups, guidance_rows=none, progress=0.1)
    leaf = torch.from_numpy(STUDENT.astype(np.float64)).requires_grad_()
    batch = TokenBatch(
        student_logprobs=leaf,
        teacher_logprobs=torch.from_numpy(teacher.astype(np.float64)),
        mu_logprobs=leaf.detach(),
        trust=torch.from_numpy(plan.trust),
        outlier=torch.from_numpy(plan.outlier),
        guidance=torch.zeros(0),
        trust_used=torch.from_numpy(np.flatnonzero(plan.trust)),
        outlier_used=torch.from_numpy(np.flatnonzero(plan.outlier)),
        guidance_logprobs=torch.zeros(0),
        reward_advantages=None
        if plan.reward_advantages is None
        else torch.from_numpy(plan.reward_advantages),
    )
    loss = sum(region_losses(objective, batch).values(), torch.zeros(()))
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad.tolist()


def naive_loss(name: str) -> tuple[list[float], list[float]]:
    """Advantage and coefficient of every token, from the recipes' formulas: the loss is -Σ c·A·log π_S."""
    if name == "scope":
        weights = [naive_weight(row, 1.0) for row in ROWS]
        right = [REWARDS[row] >= 0.5 for row in ROWS]
        sums = {
            kind: sum(w for w, r in zip(weights, right, strict=True) if r == kind) for kind in (True, False)
        }
        coefficients = [w / sums[r] for w, r in zip(weights, right, strict=True)]
        return [1.0 if r else a for a, r in zip(A, right, strict=True)], coefficients
    mean_of_tokens = [1 / TOKENS] * TOKENS
    written = sum(length > 0 for length in LENGTHS)
    by_row = [1 / (LENGTHS[row] * written) for row in ROWS]
    return {
        "grpo": ([naive_advantage(row, True) for row in ROWS], by_row),
        "dgrpo": ([a + naive_advantage(r, True) for a, r in zip(A, ROWS, strict=True)], mean_of_tokens),
        "opd-reward": ([a + naive_advantage(r, False) for a, r in zip(A, ROWS, strict=True)], mean_of_tokens),
        "uni-opd": ([a + naive_shift(r, 0.4) for a, r in zip(A, ROWS, strict=True)], mean_of_tokens),
    }[name]


@pytest.mark.parametrize("name", ["grpo", "dgrpo", "opd-reward", "uni-opd", "scope"])
def test_methods_have_the_loss_and_gradient_of_their_formula(name: str) -> None:
    advantages, coefficients = naive_loss(name)
    gradient = [-c * a for a, c in zip(advantages, coefficients, strict=True)]
    value = sum(g * float(s) for g, s in zip(gradient, STUDENT, strict=True))
    found, found_gradient = loss_and_gradient(load_objective(name), rewards())
    assert found == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(found_gradient, gradient, atol=1e-6)


ALL_WRONG = [math.nan if math.isnan(value) else 0.0 for value in REWARDS]


@pytest.mark.parametrize(
    ("name", "overrides", "values", "same_as"),
    [
        ("scope", {"token_weights": []}, ALL_WRONG, "opd"),
        ("scope", {"token_weights": [{"kind": "dual_perplexity", "temperature": 1e9}]}, ALL_WRONG, "opd"),
        ("dgrpo", {}, ALL_WRONG, "opd"),
        ("uni-opd", {}, ALL_WRONG, "opd"),
        ("dgrpo", {"reward": {"weight": 0.0}}, None, "opd"),
        ("opd-reward", {"reward": {"weight": 0.0}}, None, "opd"),
        ("dgrpo", {"reward": {"standardize": False}}, REWARDS, "opd-reward"),
        ("dgrpo", {"reward": {"distillation": 0.0}, "reduction": "sequence_mean"}, REWARDS, "grpo"),
    ],
)
def test_methods_reduce_to_each_other(
    name: str, overrides: dict[str, Any], values: list[float] | None, same_as: str
) -> None:
    given = None if values is None else rewards(values)
    found, gradient = loss_and_gradient(load_objective(name, overrides), given)
    same, same_gradient = loss_and_gradient(load_objective(same_as), rewards())
    exact = values is None
    assert found == (same if exact else pytest.approx(same, abs=1e-8))
    np.testing.assert_allclose(gradient, same_gradient, rtol=0, atol=0 if exact else 1e-8)


def test_a_weight_of_zero_asks_for_no_rewards() -> None:
    assert needs_rewards(load_objective("dgrpo"))
    assert not needs_rewards(load_objective("dgrpo", {"reward": {"weight": 0.0}}))
    assert not needs_rewards(load_objective("tropd"))


def test_rewards_alone_ask_the_teacher_for_nothing() -> None:
    assert not teacher_needs(load_objective("grpo")).token_logprobs
    assert teacher_needs(load_objective("dgrpo")).token_logprobs
    floor = {"token_weights": [{"kind": "advantage_floor"}]}
    assert teacher_needs(load_objective("grpo", floor)).token_logprobs, (
        "the weight looks at the teacher's log-probs"
    )


def test_alternatives_of_wrong_rows_are_asked_for_everywhere() -> None:
    """The service does not know which rows are wrong."""
    objective = load_objective("scope", {"outlier": {"loss": {"estimator": "topk_fkl"}}})
    assert teacher_needs(objective).topk == "all"


def test_missing_rewards_are_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="needs the rewards"):
        loss_and_gradient(load_objective("dgrpo"), None)


CONFLICTS = [
    ('name = "grpo"\nrollouts = "teacher"\nschedule = { kind = "constant" }', "no response of the student"),
    ('name = "full-fkl"\nreward = { kind = "group" }', "no region has it"),
    ('name = "grpo"\nreward = { weight = 0.0 }', "nothing to learn from"),
    ('name = "vopd"\nreward = { kind = "margin" }', "baseline = 'none'"),
    ('name = "opd"\ntrust = { loss = { estimator = "nll" } }', "partition.rule = 'reward'"),
    ('name = "scope"\noutlier = { loss = { estimator = "nll" } }', "its own samples"),
]


@pytest.mark.parametrize(("text", "message"), CONFLICTS)
def test_impossible_uses_of_rewards_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"[rollout]\nsamples_per_prompt = 4\n[objective]\n{text}\n")


SETTINGS = [
    ("", "source = 'function'", 'source = "function"'),
    ("", "do not go together", 'function = "own:reward"'),
    ("", "needs objective.rollouts = 'stored'", 'source = "field"\nfield = "score"'),
    ("", "per = 'token' needs", 'per = "token"'),
    ('[data]\nanswer_field = ""\n', "data.answer_field is empty", ""),
    ("", "pattern", 'source = "function"\nfunction = "own.py"'),
]


@pytest.mark.parametrize(("before", "message", "reward"), SETTINGS)
def test_impossible_sources_of_rewards_are_refused(before: str, message: str, reward: str) -> None:
    distance = "" if "answer_field" not in before else "[evaluation]\ndistance_prompts = 8\n"
    with pytest.raises(ConfigError, match=message):
        parse_config(f'{before}{distance}[objective]\nname = "grpo"\n[reward]\n{reward}\n')


def warnings(text: str) -> list[str]:
    found = parse_config(text)
    return unusual(found.config, found.origins)


def test_one_response_per_prompt_is_warned_of_where_its_reward_adds_nothing() -> None:
    text = '[rollout]\nsamples_per_prompt = 1\n[objective]\nname = "{}"\n'
    for name in ("dgrpo", "uni-opd"):
        (warning,) = warnings(text.format(name))
        assert f"leaves {name} nothing to compare" in warning
    for name in ("tropd", "scope", 'dgrpo"\nreward.weight = 0 #'):
        assert not warnings(text.format(name))
    by_token = '[reward]\nsource = "function"\nfunction = "own:judge"\nper = "token"\n'
    assert not warnings(text.format("dgrpo") + by_token)


@pytest.mark.parametrize("by_token", [False, True])
def test_rewards_alone_train_a_group_of_one_by_its_tokens_only(by_token: bool) -> None:
    """The refusal of one response per prompt is exact."""
    given = rewards(tokens=[float(token % 3) for token in range(TOKENS)] if by_token else None)
    alone = replace(given, groups=np.arange(len(GROUPS)))
    _, gradient = loss_and_gradient(load_objective("grpo"), alone)
    assert np.any(gradient) == by_token
    assert learns_by_comparison_alone(load_objective("grpo"))
