"""Encoding of alternatives as bytes and back: ids as gaps, log-probs as codes.

A token's alternatives are a set of (id, log-prob) pairs whose order follows from the log-probs, so the order
need not be stored. They are sorted by id, ids become the gaps between them (a gap of a set takes 7 bits where
an id takes 12), and log-probs are permuted with them, as codes counted back from the largest code of the token
(``ceilings``), near which most lie. Decoding sorts the alternatives back, equal log-probs by id.
docs/cache.md has the measurements that this and the choices below rest on.

=========  ==========================  =========================================================================
precision  code of a log-prob          error of a log-prob l
=========  ==========================  =========================================================================
float16    magnitude bits, uint16      |l|/2048 (the rounding of ``TopK`` itself: this encoding is lossless)
q8         logarithmic level, uint8    0.016·(|l| + H + 0.02) + 0.001, H = entropy of the kept alternatives
=========  ==========================  =========================================================================

q8 has 255 levels, ``-0.01·(e^(q·a) - 1)`` from 0 to -20: a relative error of 1.5 %, as an 8-bit float has; values
below -20 become -20. The tail is kept to half precision, and decoded log-probs are shifted per token so that
kept mass and tail add up to exactly 1: this takes the error out of the dominant alternative, whose complement
is small and known well, and makes the error of a KL up to five times smaller. With d the largest error of a
token's log-probs, its Σ π_T·(log π_T - log π_S) over the alternatives is off by at most
(e^d - 1)·Σ π_T·|log π_T - log π_S| + d·e^d; measured errors (docs/cache.md) are far smaller, having both signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Precision = Literal["float16", "q8"]

LEVELS = 255
RANGE = 20.0
KNEE = 0.01
"""Below this magnitude levels are evenly spaced, above it their distance grows with the magnitude."""
RELATIVE_STEP = float(np.log(RANGE / KNEE + 1.0) / (LEVELS - 1))
MAX_RELATIVE_ERROR = RELATIVE_STEP / 2

_INFINITE = 0x7C00  # the float16 bits of infinity: all finite magnitudes lie below
_LEVELS = KNEE * np.expm1(RELATIVE_STEP * np.arange(LEVELS))  # magnitudes, float64
_MASS_OF_LEVEL = np.exp(-_LEVELS)
with np.errstate(
    invalid="ignore", over="ignore"
):  # the table has a place for NaN and for what is never a log-prob
    _MASS_OF_HALF = np.exp(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64))
_LEVEL_OF = np.minimum(
    np.rint(
        np.log1p(np.arange(_INFINITE, dtype=np.uint16).view(np.float16).astype(np.float64) / KNEE)
        / RELATIVE_STEP
    ),
    LEVELS - 1,
).astype(np.uint16)
# A missing Zarr chunk reads as the fill value: each is one that no encoder writes.
FILL: dict[str, Any] = {
    "offsets": -1,
    "counts": np.iinfo(np.uint16).max,
    "id_gaps": np.iinfo(np.uint32).max,
    "codes": {"float16": np.iinfo(np.uint16).max, "q8": np.iinfo(np.uint8).max},
    "ceilings": {"float16": np.iinfo(np.uint16).max, "q8": np.iinfo(np.uint8).max},
    "tail": np.nan,
    "sampled": np.nan,
}
# Tokens per sort: their number must fit the 16 bits that the packed sort key has for it.
BLOCK_TOKENS = 1 << 16

Arrays = dict[str, npt.NDArray[Any]]


def encode_topk(
    counts: npt.NDArray[np.uint16],
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float16],
    tail: npt.NDArray[np.float32],
    teacher_logprobs: npt.NDArray[np.float32],
    precision: Precision,
) -> Arrays:
    """``id_gaps``, ``codes`` (``[Σ counts]``), ``ceilings``, ``tail`` and ``sampled`` (``[tokens]``) as stored."""
    codes = _to_codes(logprobs, precision)
    ceilings = np.zeros(len(counts), dtype=np.uint64)
    ceilings[counts > 0] = codes[
        _starts(counts) + counts[counts > 0].astype(np.int64) - 1
    ]  # the last is largest
    codes = np.repeat(ceilings, counts) - codes
    gaps = np.empty(len(ids), dtype=np.uint32)
    for tokens, part, token_of in _blocks(counts):
        packed = (token_of << np.uint64(48)) | (ids[part].astype(np.uint64) << np.uint64(16)) | codes[part]
        packed.sort()
        codes[part] = packed & np.uint64(0xFFFF)
        in_order = (packed >> np.uint64(16)).astype(np.uint32)  # drops the token's number
        gaps[part] = np.diff(in_order, prepend=np.uint32(0))
        starts = _starts(counts[tokens])
        gaps[part][starts] = in_order[starts]
    small, code = (np.float16, np.uint8) if precision == "q8" else (np.float32, np.uint16)
    return {
        "id_gaps": gaps,
        "codes": codes.astype(code),
        "ceilings": ceilings.astype(code),
        "tail": tail.astype(small),
        "sampled": teacher_logprobs.astype(small),
    }


def decode_topk(counts: npt.NDArray[np.uint16], arrays: Mapping[str, Any], precision: Precision) -> Arrays:
    """``ids`` int32, ``logprobs`` float16 (descending per token, equal ones by id), ``tail`` and ``teacher_logprobs``
    float32.

    Raises:
        ValueError: values that no encoder writes.
    """
    gaps, ceilings = arrays["id_gaps"], arrays["ceilings"]
    highest = np.repeat(ceilings, counts)
    if np.any(ceilings >= (LEVELS if precision == "q8" else _INFINITE)) or np.any(arrays["codes"] > highest):
        raise ValueError("log-prob codes that no encoder writes")
    codes = highest - arrays["codes"]
    tail = arrays["tail"].astype(np.float32)
    ids = np.empty(len(gaps), dtype=np.int32)
    logprobs = np.empty(len(gaps), dtype=np.float16)
    for tokens, part, token_of in _blocks(counts):
        starts = _starts(counts[tokens])
        running = np.cumsum(gaps[part], dtype=np.uint64)
        before = np.zeros(len(starts), dtype=np.uint64)
        before[1:] = running[starts[1:] - 1]
        filled = counts[tokens][counts[tokens] > 0]
        packed = running - np.repeat(before, filled)
        if len(packed) and packed.max() > np.iinfo(np.int32).max:
            raise ValueError("ids that do not fit 32 bits")
        packed |= (token_of << np.uint64(48)) | (codes[part].astype(np.uint64) << np.uint64(32))
        packed.sort()
        ids[part] = (packed & np.uint64(0x7FFFFFFF)).astype(np.int32)
        ordered = ((packed >> np.uint64(32)) & np.uint64(0xFFFF)).astype(np.uint16)
        if precision == "float16":
            logprobs[part] = (ordered | np.uint16(0x8000)).view(np.float16)
        else:
            logprobs[part] = _from_levels(ordered, filled, starts, tail[tokens][counts[tokens] > 0])
    return {
        "ids": ids,
        "logprobs": logprobs,
        "tail": tail,
        "teacher_logprobs": arrays["sampled"].astype(np.float32),
    }


def q8_error(logprobs: npt.NDArray[np.float64], entropy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest error of q8 log-probs above -``RANGE``; ``entropy`` is that of their token's alternatives, in nats."""
    return 0.016 * (np.abs(logprobs) + entropy + 0.02) + 0.001


def canonical_ids(
    counts: npt.NDArray[np.uint16], ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float16]
) -> npt.NDArray[np.int32]:
    """The ids with those of equal log-probs in rising order; ``logprobs`` must be descending per token."""
    if not (logprobs[1:] == logprobs[:-1]).any():
        return ids
    ordered = np.empty_like(ids)
    magnitudes = _to_codes(logprobs, "float16")
    for _, part, token_of in _blocks(counts):
        packed = (
            (token_of << np.uint64(48)) | (magnitudes[part] << np.uint64(32)) | ids[part].astype(np.uint64)
        )
        packed.sort()
        ordered[part] = (packed & np.uint64(0x7FFFFFFF)).astype(np.int32)
    return ordered


def probabilities(logprobs: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    """exp of halves, looked up: there are only 65,536 of them."""
    return _MASS_OF_HALF[logprobs.view(np.uint16)]


def _to_codes(logprobs: npt.NDArray[np.float16], precision: Precision) -> npt.NDArray[np.uint64]:
    magnitudes = np.minimum(logprobs, np.float16(0)).view(np.uint16) & np.uint16(0x7FFF)
    return (magnitudes if precision == "float16" else _LEVEL_OF[magnitudes]).astype(np.uint64)


def _from_levels(
    levels: npt.NDArray[np.uint16],
    counts: npt.NDArray[np.uint16],
    starts: npt.NDArray[np.int64],
    tail: npt.NDArray[np.float32],
) -> npt.NDArray[np.float16]:
    """Log-probs of levels, shifted per token so that they have the mass that the tail leaves."""
    if not len(levels):
        return np.zeros(0, dtype=np.float16)
    mass = np.add.reduceat(_MASS_OF_LEVEL[levels], starts)
    left = -np.expm1(np.minimum(tail.astype(np.float64), 0.0))
    shift = np.where(left > 0, np.log(np.maximum(left, 1e-300)) - np.log(mass), 0.0)
    return np.minimum(np.repeat(shift, counts) - _LEVELS[levels], 0.0).astype(np.float16)


def _starts(counts: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Position of the first alternative of each token that has any."""
    filled = counts[counts > 0].astype(np.int64)
    return np.cumsum(filled) - filled


def _blocks(counts: npt.NDArray[np.uint16]) -> Iterator[tuple[slice, slice, npt.NDArray[np.uint64]]]:
    """Blocks of tokens: their slice, the slice of their alternatives, and the token number of each of those."""
    low = 0
    for first in range(0, len(counts), BLOCK_TOKENS):
        tokens = slice(first, min(first + BLOCK_TOKENS, len(counts)))
        block = counts[tokens]
        high = low + int(block.sum(dtype=np.int64))
        yield tokens, slice(low, high), np.repeat(np.arange(len(block), dtype=np.uint64), block)
        low = high
