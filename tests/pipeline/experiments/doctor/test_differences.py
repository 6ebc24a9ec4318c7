"""Figures of two parts, what rounding explains, and what differences make of a partition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.experiments.doctor.differences import (
    NamedLogprobs,
    advice,
    difference,
    false_outliers,
    meaning,
)


def part(*logprobs: float, precision: torch.dtype = torch.float32) -> NamedLogprobs:
    return NamedLogprobs("one", precision, np.array(logprobs, dtype=np.float32))


def test_figures_are_those_of_absolute_differences() -> None:
    found = difference(part(-1.0, -2.0, -3.0, -4.5), part(-1.0, -2.5, -2.75, -4.5))
    assert found.mean == pytest.approx(0.75 / 4)
    assert found.largest == pytest.approx(0.5)
    assert found.p99 == pytest.approx(np.quantile([0, 0.5, 0.25, 0], 0.99))
    assert (found.lowest_weight, found.highest_weight) == pytest.approx((np.exp(-0.25), np.exp(0.5)))
    assert (found.beyond, found.sound) == (2, False)
    [line] = advice([found])
    assert "more than rounding explains: mean 0.19" in line


def test_the_coarser_part_decides_what_is_allowed() -> None:
    low = part(-1.0, -8.0, precision=torch.bfloat16)
    assert difference(part(-1.04, -8.05), low).sound
    assert not difference(part(-1.04, -8.05), part(-1.0, -8.0)).sound
    assert not difference(part(-1.06, -8.05), low).sound  # on average more
    assert difference(part(-1.06, -8.05), low, mean_limit=0.1).sound
    # One token, by a share of its log-prob.
    many = np.full(200, -8.0, dtype=np.float32)
    moved = np.where(np.arange(200) == 7, -8.0 * 1.25, many).astype(np.float32)
    assert difference(
        NamedLogprobs("a", torch.bfloat16, moved), NamedLogprobs("b", torch.bfloat16, many)
    ).sound
    assert not difference(
        NamedLogprobs("a", torch.bfloat16, moved * 1.1), NamedLogprobs("b", torch.bfloat16, many)
    ).sound


def test_tokens_without_a_finite_logprob_are_no_rounding() -> None:
    found = difference(part(-1.0, np.nan), part(-1.0, -1.0))
    assert (found.mean, found.beyond, found.sound) == (0.0, 1, False)
    assert difference(part(-1.0, -np.inf), part(-1.0, -np.inf)).sound
    none = difference(part(np.nan), part(-1.0))
    assert (none.mean, none.largest, none.sound) == (None, None, False)
    assert "mean none" in advice([none])[0]


def test_false_outliers_are_those_that_only_a_difference_makes() -> None:
    student = np.log(np.full(4, 0.5, dtype=np.float32))
    teacher = np.log(np.array([0.5, 0.45, 0.55, 0.25], dtype=np.float32))
    draws = np.array([0.99, 0.95, 0.99, 0.3])
    found = false_outliers(load_objective("tropd"), student, teacher, draws, None)
    assert found.rejected == pytest.approx((0 + 0.1 + 0 + 0.5) / 4, abs=1e-6)
    assert found.share == 0.25
    assert "takes 25.00% of its tokens for outliers, though none exist: they would learn" in meaning(
        load_objective("tropd"), found
    )
    same = false_outliers(load_objective("tropd"), student, student, draws, np.ones(4, dtype=np.float32))
    assert (same.rejected, same.share, same.with_teacher) == (0.0, 0.0, 1.0)
    # Plain on-policy distillation trusts every token, however far the two are apart.
    assert false_outliers(load_objective("opd"), student, teacher, draws, None).share == 0.0
