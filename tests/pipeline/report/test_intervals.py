"""Intervals against textbook values, limits, and coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tropd.pipeline.report.intervals import accuracy_interval, paired_interval, wilson


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
