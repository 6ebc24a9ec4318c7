"""The prefix-length curriculum."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tropd.pipeline.objectives.objective import Schedule
from tropd.pipeline.objectives.prefix_schedule import prefix_length, row_limit, scheduled_length


def length(step: int, **fields: object) -> int:
    return scheduled_length(Schedule(**fields), step=step, total_steps=200, max_tokens=8096)  # type: ignore[arg-type]


def test_the_papers_schedule_starts_off_policy_and_ends_on_policy() -> None:
    for step in (0, 1, 50, 100, 199):
        exact = 8096 * 0.5 * (1 + math.cos(math.pi * step / 200))
        assert length(step, kind="cosine") == round(exact)
    assert length(0, kind="cosine") == 8096
    assert length(100, kind="cosine") == 4048
    assert length(200, kind="cosine") == 0


def test_shares_of_length_and_steps() -> None:
    assert length(0, kind="cosine", fraction=0.25) == 2024
    assert length(99, kind="cosine", steps_share=0.5) == 2
    assert length(100, kind="cosine", steps_share=0.5) == 0
    assert length(150, kind="constant", fraction=0.5) == 4048
    assert length(0, kind="none") == 0


@given(st.integers(0, 198))
def test_prefixes_never_grow(step: int) -> None:
    assert length(step + 1, kind="cosine") <= length(step, kind="cosine")


def test_uniform_lengths_cover_zero_to_the_limit() -> None:
    schedule = Schedule(kind="cosine", length="uniform")
    drawn = [prefix_length(schedule, limit=4, seed=s) for s in range(500)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert sum(drawn) / 500 == pytest.approx(2.0, abs=0.25)
    assert prefix_length(Schedule(kind="cosine"), limit=4, seed=0) == 4


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_a_share_of_a_trajectory(limit: int, written: int, max_tokens: int) -> None:
    limit, written = min(limit, max_tokens), min(written, max_tokens)
    found = row_limit(
        Schedule(kind="cosine", unit="trajectory"), limit=limit, max_tokens=max_tokens, written=written
    )
    assert found == math.floor(Fraction(limit, max_tokens) * written)
    assert found < written or limit == max_tokens or written == 0
    assert row_limit(Schedule(kind="cosine"), limit=limit, max_tokens=max_tokens, written=written) == limit
