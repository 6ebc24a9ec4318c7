"""Derived seeds and a counter-based uniform generator.

Randomness here is a pure function of *what* is drawn, never of *when*: a result depends neither on batch
size, nor on the number of workers, nor on where a run was interrupted. ``derive_seed`` hashes a path such as
``(run seed, "rollout", step, prompt_id, sample)`` to 64 bits; ``uniforms`` turns (seed, counter) pairs into
numbers in [0, 1) with the SplitMix64 finalizer (Steele, Lea and Flood, 2014), vectorized and stateless.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_seed(*path: str | int) -> int:
    """A 63-bit seed for a path of strings and integers; different paths give unrelated seeds."""
    text = json.dumps([part if isinstance(part, str) else int(part) for part in path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seeds: npt.ArrayLike, counters: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per broadcast pair of seed and counter (both ≥ 0)."""
    seed_array = np.asarray(seeds, dtype=np.uint64)
    counter_array = np.asarray(counters, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = seed_array + (counter_array + np.uint64(1)) * _GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
