"""avg@n and pass@k against brute force, and whether the intervals hold what they promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.evaluation.statistics import average, pass_at, pass_probability


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
