"""avg@n and pass@k against brute force, and whether the intervals hold what they promise: textbook values, coverage."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.stages.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    average,
    over_seeds,
    paired_interval,
    pass_at,
    pass_probability,
    token_mean,
    token_mean_change,
    wilson,
)


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n), st.integers(1, n))
    )
)
@settings(max_examples=200, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(case: tuple[list[bool], int]) -> None:
    marks, k = case
    subsets = list(combinations(marks, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_probability(len(marks), sum(marks), k) == pytest.approx(expected, abs=1e-12)


def test_means_are_over_problems() -> None:
    correct = [[True, True, False, False], [False] * 4, [True] * 4]
    assert average(correct).value == pytest.approx((0.5 + 0 + 1) / 3)
    assert pass_at(1, correct).value == pytest.approx(average(correct).value)
    assert pass_at(2, correct).value == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)
    assert pass_at(4, correct).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"pass@5 needs at least 5 responses"):
        pass_at(5, correct)


def test_the_same_seed_gives_the_same_interval() -> None:
    correct = [[i % 3 == 0, i % 2 == 0] for i in range(30)]
    assert average(correct, seed=3) == average(correct, seed=3)
    found = average(correct)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("value", [False, True])
def test_without_spread_the_interval_is_not_a_point(value: bool) -> None:
    found = average([[value] * 4] * 30)
    assert found.value == float(value)
    assert found.high - found.low == pytest.approx(0.1)


@pytest.mark.parametrize(("problems", "samples"), [(30, 8), (200, 1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(problems: int, samples: int) -> None:
    generator = np.random.default_rng(1)
    truth, hits, rounds = 0.4, 0, 1000
    for seed in range(rounds):
        difficulty = generator.beta(1.2, 1.8, size=problems)  # mean 0.4: problems differ much
        correct = [(generator.random(samples) < p).tolist() for p in difficulty]
        found = average(correct, seed=seed)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / rounds <= 0.98


Sums = tuple[np.ndarray, np.ndarray]  # type: ignore[type-arg]


def skewed(generator: np.random.Generator, problems: int) -> Sums:
    """Sums over tokens and their number: KLs of most tokens are near 0, problems differ, long ones more."""
    tokens = np.maximum(1, generator.lognormal(3.0, 0.6, problems)).astype(int)
    scale = generator.gamma(1.5, 1 / 1.5, problems) * (tokens / 20) ** 0.2
    return generator.gamma(0.15 * tokens, scale / 0.15), tokens


@pytest.mark.parametrize("problems", [24, 64])
def test_the_interval_of_a_mean_over_tokens_covers(problems: int) -> None:
    generator = np.random.default_rng(1)
    sums, tokens = skewed(generator, 1_000_000)
    truth, hits, rounds = sums.sum() / tokens.sum(), 0, 400
    for seed in range(rounds):
        found = token_mean(*skewed(generator, problems), bounds=(0.0, np.inf), seed=seed)
        assert 0.0 <= found.low <= found.value <= found.high
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / rounds <= 0.98


def test_a_mean_over_tokens_weighs_problems_by_their_tokens() -> None:
    found = token_mean([1.0, 9.0, 2.0], [1, 3, 4], bounds=(0.0, 2.0))
    assert found.value == 12 / 8
    assert found.high == 2.0
    assert token_mean([2.0, 4.0, 6.0], [1, 2, 3], bounds=(0.0, 9.0)).high == 2.0  # nothing varies
    few = token_mean([1.0, 4.0], [1, 2], bounds=(0.0, 9.0))
    assert few.value == 5 / 3
    assert np.isnan([few.low, few.high]).all()
    assert np.isnan(token_mean([], [], bounds=(0.0, 1.0)).value)


@pytest.mark.parametrize("problems", [24, 64])
def test_the_interval_of_a_change_covers_and_is_narrower_where_problems_stay_alike(problems: int) -> None:
    generator = np.random.default_rng(problems)
    hits, widths, rounds = 0, [], 300

    def drawn(problems: int) -> tuple[Sums, Sums]:
        sums, tokens = skewed(generator, problems)
        return (sums, tokens), (sums * generator.uniform(0.6, 1.0, problems), tokens)

    (sums, tokens), (fewer, _) = drawn(400_000)
    truth = (fewer.sum() - sums.sum()) / tokens.sum()
    for seed in range(rounds):
        before, after = drawn(problems)
        found = token_mean_change(before, after, seed=seed)
        alone = [token_mean(*one, bounds=(0.0, np.inf), seed=seed) for one in (before, after)]
        assert found.value == pytest.approx(alone[1].value - alone[0].value)
        hits += found.low <= truth <= found.high
        widths.append((found.high - found.low) / (alone[0].high - alone[0].low))
    assert 0.88 <= hits / rounds <= 0.98
    assert np.median(widths) < 0.5


def test_a_change_of_nothing_is_none() -> None:
    same = ([1.0, 9.0, 2.0, 5.0], [1, 3, 4, 2])
    found = token_mean_change(same, same)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert np.isnan(token_mean_change(([1.0], [1]), ([2.0], [1])).low)


def test_where_nearly_all_are_alike_the_interval_has_two_sides_and_ends_among_the_values() -> None:
    lengths = token_mean([48.0] * 14 + [12.0], [1] * 15, bounds=(0.0, np.inf))
    assert 36.0 < lengths.low < lengths.value == pytest.approx(45.6)
    assert lengths.value < lengths.high <= 48.0
    cut = token_mean([1.0] * 14 + [0.0], [1] * 15, bounds=(0.0, 1.0))
    assert (cut.low < 0.9, cut.high) == (True, 1.0)
    rare = token_mean([0.0] * 19 + [1.0], [1] * 20, bounds=(0.0, 1.0))
    assert (rare.low, rare.high > 0.1) == (0.0, True)


def test_wilson_solves_its_defining_equation() -> None:
    z = 1.959963984540054
    for share, size in ((0.4, 50), (0.03, 500), (1.0, 12), (0.0, 7)):
        for bound in wilson(share, size):
            # Both ends p satisfy |share - p| = z·sqrt(p(1-p)/size).
            assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / size), abs=1e-7)


def test_one_response_per_problem_is_the_ordinary_wilson_interval() -> None:
    right = np.array([1.0] * 30 + [0.0] * 20)
    assert accuracy_interval(right, samples=50) == pytest.approx(wilson(0.6, 50))


def test_identical_responses_do_not_narrow_the_interval() -> None:
    right = np.array([1.0] * 30 + [0.0] * 20)
    assert accuracy_interval(right, samples=50 * 32) == pytest.approx(wilson(0.6, 50))
    assert accuracy_interval(np.ones(30), samples=30 * 32) == pytest.approx(wilson(1.0, 30))


def test_problems_of_equal_difficulty_count_every_response() -> None:
    assert accuracy_interval(np.full(10, 0.5), samples=40) == pytest.approx(wilson(0.5, 40))


@pytest.mark.parametrize("samples", [1, 8])
def test_coverage_over_problems_of_varied_difficulty(samples: int) -> None:
    noise = np.random.default_rng(0)
    runs, problems, covered = 2000, 40, 0
    for _ in range(runs):
        difficulty = noise.beta(1.2, 0.8, size=problems)
        means = noise.binomial(samples, difficulty) / samples
        low, high = accuracy_interval(means, samples * problems)
        covered += low <= 0.6 <= high
    assert 0.92 <= covered / runs <= 0.98


def test_paired_interval() -> None:
    differences = np.array([1.0, 0.0, 0.0, -1.0, 1.0, 1.0])
    low, high = paired_interval(differences)
    half = 1.959963984540054 * differences.std(ddof=1) / math.sqrt(6)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert paired_interval(np.array([1.0])) == (-1.0, 1.0)


def over(values: Any, **options: int) -> Estimate:
    return over_seeds(values, np.ones_like(values), **options)


def test_over_seeds_the_interval_holds_the_mean_and_shrinks_with_data() -> None:
    generator = np.random.default_rng(0)
    small = over((generator.random((3, 50)) < 0.4).astype(float), seed=1)
    large = over((generator.random((3, 2000)) < 0.4).astype(float), seed=1)
    for found in (small, large):
        assert found.low <= found.value <= found.high
    assert large.high - large.low < (small.high - small.low) / 2
    assert over(np.ones((3, 40)), seed=0) == Estimate(1.0, 1.0, 1.0)


def test_over_seeds_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    truth, covered, trials = 0.3, 0, 100
    for trial in range(trials):
        found = over((generator.random((4, 150)) < truth).astype(float), seed=trial, draws=300)
        covered += found.low <= truth <= found.high
    assert covered / trials >= 0.88


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.random((1, 400))
    one = (generator.random((3, 400)) * 0.2 + difficulty < 0.6).astype(float)
    other = (generator.random((3, 400)) * 0.2 + difficulty < 0.65).astype(float)
    paired = over(other - one, seed=0)
    width = over(one, seed=0)
    assert paired.high - paired.low < width.high - width.low
    assert paired.low > 0


def test_over_seeds_the_interval_of_a_ratio_covers_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, covered, trials = 0.3, 0, 100
    for trial in range(trials):
        tokens = generator.integers(5, 40, size=(4, 64)).astype(float)
        sums = generator.gamma(0.5 * tokens, truth / 0.5)
        found = over_seeds(sums, tokens, seed=trial, draws=300)
        covered += found.low <= truth <= found.high
    assert covered / trials >= 0.88
