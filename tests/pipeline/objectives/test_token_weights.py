"""Token weights of rows and tokens against loops over the definition, on random steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.objectives.loss import plan_step
from tropd.pipeline.objectives.objective import FixedAdvantage
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.objectives.token_weight_specs import (
    EntropyProduct,
    LateTokens,
    RowRatio,
    StudentLogprobBottom,
    TeachabilityTop,
    TeacherLikelyRows,
)
from tropd.pipeline.objectives.token_weights import TokenStatistics, token_weight

EXACT = 1e-12


def step(seed: int, lengths: tuple[int, ...] = (3, 1, 5, 4, 2)) -> TokenStatistics:
    """A step of rows with these many tokens."""
    random = np.random.default_rng(seed)
    total = sum(lengths)
    return TokenStatistics(
        rows=np.repeat(np.arange(len(lengths)), lengths),
        advantages=random.normal(size=total) * 2,
        student_entropy=random.gamma(1.0, size=total),
        student_logprobs=-random.gamma(1.0, size=total),
        teacher_entropy=random.gamma(1.0, size=total),
        divergence=random.gamma(1.0, size=total),
        teacher_mass=random.random(size=total),
    )


def tokens_of_rows(statistics: TokenStatistics) -> list[list[int]]:
    return [[t for t, r in enumerate(statistics.rows) if r == row] for row in sorted(set(statistics.rows))]


@pytest.mark.parametrize("seed", range(4))
def test_the_least_likely_fifth_of_the_students_tokens(seed: int) -> None:
    statistics = step(seed)
    assert statistics.student_logprobs is not None
    order = np.argsort(statistics.student_logprobs)
    weights = token_weight(StudentLogprobBottom(fraction=0.2), statistics, 0.0)
    assert set(np.flatnonzero(weights)) == set(order[: math.floor(0.2 * 15)])
    assert token_weight(StudentLogprobBottom(fraction=0.01), statistics, 0.0).sum() == 1


@pytest.mark.parametrize("seed", range(4))
def test_rows_below_the_quantile_of_the_teachers_mean_log_prob_count_nothing(seed: int) -> None:
    statistics = step(seed)
    assert statistics.student_logprobs is not None
    means = []
    for tokens in tokens_of_rows(statistics):
        teacher = [statistics.advantages[t] + statistics.student_logprobs[t] for t in tokens]
        means.append(sum(teacher) / len(teacher))
    weights = token_weight(TeacherLikelyRows(dropped=0.2), statistics, 0.0)
    # With five rows, the 20 % quantile lies between the lowest mean and the next.
    lowest = means.index(min(means))
    for row, tokens in enumerate(tokens_of_rows(statistics)):
        assert all(weights[t] == (row != lowest) for t in tokens)
    assert token_weight(TeacherLikelyRows(dropped=0.0), statistics, 0.0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_product_of_the_teachers_confidence_and_the_students_doubt(seed: int) -> None:
    statistics = step(seed)
    teacher, student = statistics.teacher_entropy, statistics.student_entropy
    assert teacher is not None
    assert student is not None
    weights = token_weight(EntropyProduct(alpha=0.7, beta=2.0), statistics, 0.0)
    for t in range(15):
        confidence, doubt = 1 - teacher[t] / max(teacher), student[t] / max(student)
        assert abs(weights[t] - (1 + 0.7 * confidence) * (1 + 2.0 * doubt)) < EXACT


@pytest.mark.parametrize("seed", range(4))
def test_rows_weigh_by_the_clamped_ratio_of_their_unlikely_tokens(seed: int) -> None:
    statistics = step(seed)
    spec = RowRatio(threshold=0.5, most=2.0, temperature=1.5, largest=1.8)
    raw = []
    for tokens in tokens_of_rows(statistics):
        kept = [min(-statistics.advantages[t], 2.0) for t in tokens]
        kept = [ratio for ratio in kept if ratio >= 0.5]
        raw.append(math.exp(sum(kept) / len(kept) / 1.5) if kept else 1.0)
    weights = token_weight(spec, statistics, 0.0)
    for row, tokens in enumerate(tokens_of_rows(statistics)):
        expected = min(raw[row] / (sum(raw) / len(raw)), 1.8)
        assert all(abs(weights[t] - expected) < EXACT for t in tokens)


@pytest.mark.parametrize("seed", range(4))
def test_late_tokens_of_a_row_weigh_more(seed: int) -> None:
    statistics = step(seed)
    weights = token_weight(LateTokens(least=0.25, middle=0.3, width=0.1), statistics, 0.0)
    for tokens in tokens_of_rows(statistics):
        for number, t in enumerate(tokens):
            place = (number + 0.5) / len(tokens)
            assert abs(weights[t] - (0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1)))) < EXACT
    steep = token_weight(LateTokens(least=0.0, middle=0.5, width=1e-9), statistics, 0.0)
    assert np.isfinite(steep).all()


@pytest.mark.parametrize("seed", range(4))
def test_tokens_where_the_teacher_differs_and_can_teach(seed: int) -> None:
    statistics = step(seed)
    assert statistics.divergence is not None
    assert statistics.teacher_mass is not None

    def bounded(values: np.ndarray, z: float) -> float:
        low, high = np.quantile(values, 0.05), np.quantile(values, 0.95)
        return min(max((z - low) / (high - low), 0.0), 1.0)

    scores = [
        bounded(statistics.divergence, d) * bounded(statistics.teacher_mass, m)
        for d, m in zip(statistics.divergence, statistics.teacher_mass, strict=True)
    ]
    weights = token_weight(TeachabilityTop(fraction=0.2), statistics, 0.0)
    assert set(np.flatnonzero(weights)) == set(np.argsort(scores)[-3:])


def test_weights_of_a_step_without_student_tokens() -> None:
    none = TokenStatistics(np.zeros(0, dtype=np.int64), np.zeros(0))
    for spec in (
        StudentLogprobBottom(),
        TeacherLikelyRows(),
        EntropyProduct(),
        RowRatio(),
        TeachabilityTop(),
        LateTokens(),
    ):
        assert len(token_weight(spec, none, 0.0)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_by_entropy_is_ranked_among_the_tokens_that_count(seed: int) -> None:
    objective = load_objective("opsa")
    statistics = step(seed)
    assert isinstance(objective.trust.loss, FixedAdvantage)
    assert statistics.student_logprobs is not None
    assert statistics.student_entropy is not None
    plan = plan_step(
        objective,
        Regions(np.ones(15, dtype=np.float32), np.zeros(15, dtype=np.float32)),
        statistics,
        groups=statistics.rows,
        guidance_rows=np.zeros(0, dtype=np.int64),
        progress=0.0,
    )
    chosen = np.argsort(statistics.student_logprobs)[:3]
    assert set(np.flatnonzero(plan.trust)) == set(chosen)
    assert plan.trust[chosen] == pytest.approx(1 / 3)  # the mean is over the tokens that count
    entropies = [float(statistics.student_entropy[t]) for t in chosen]
    low, high = min(entropies), max(entropies)
    assert plan.trust_advantages is not None
    for t, entropy in zip(chosen, entropies, strict=True):
        assert plan.trust_advantages[t] == pytest.approx(
            -0.5 - 0.5 * (entropy - low) / (high - low), abs=EXACT
        )
