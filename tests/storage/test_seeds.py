"""Seeds: pure functions of what is drawn."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tropd.storage.seeds import derive_seed, uniforms

MASK = (1 << 64) - 1


def splitmix64(seed: int, counter: int) -> float:
    """The finaliser in plain integers, as an independent reference."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40), max_size=5))
def test_uniforms_match_the_reference(seed: int, counters: list[int]) -> None:
    drawn = uniforms(seed, np.asarray(counters, dtype=np.uint64))
    assert drawn.tolist() == [splitmix64(seed, counter) for counter in counters]


def test_uniforms_are_uniform_and_independent_of_shape() -> None:
    seeds = np.array([derive_seed("run", i) for i in range(200)], dtype=np.uint64)
    drawn = uniforms(seeds[:, None], np.arange(500)[None, :])
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 0.005
    assert np.abs(np.histogram(drawn, bins=20, range=(0, 1))[0] / drawn.size - 0.05).max() < 0.003
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.01
    assert uniforms(seeds[7], 11) == drawn[7, 11]


parts = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=4), max_size=4)


@given(parts, parts)
def test_derived_seeds_differ_where_paths_do(one: list, other: list) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_seed_is_pinned() -> None:
    """A change here gives every resumed run other samples than it began with."""
    assert derive_seed(1, "rollout", 7, "p1", 0) == 5194436843023541545
    assert derive_seed("1") != derive_seed(1)
    assert derive_seed("a\x1fs:b") != derive_seed("a", "b")
    assert derive_seed("\ud800") != derive_seed("?")
    assert derive_seed(np.int64(5)) == derive_seed(5)
