"""The ragged top-k cache: for every token of a trajectory, the teacher's likeliest alternatives.

One Zarr v3 group per shard (DESIGN: ``part-00000.zarr``) with the tokens of all rows concatenated in row order:

===========  ========================  ==========================================================
array        dtype, length             content
===========  ========================  ==========================================================
offsets      int64[rows + 1]           tokens of row r are offsets[r] : offsets[r + 1]
counts       uint16[tokens]            alternatives kept at a token
ids          int32[Σ counts]           their token ids
logprobs     float16[Σ counts]         their natural log-probs, descending within a token
tail         float32[tokens]           log of the probability mass that was not kept (-inf if none)
sampled      float32[tokens]           log-prob of the token that the trajectory has
===========  ========================  ==========================================================

Kept are as many alternatives as reach the mass, at most k. ``tail`` is computed from the rounded (float16)
log-probs, so that kept and tail mass of what is stored add up to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from tropd.storage.atomic import atomic_directory
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError

SCHEMA_VERSION = 1
CHUNK_ELEMENTS = 1 << 18
LOGPROB_SLACK = 1e-3  # log-softmax in float32 may end a little above 0
MASS_TOLERANCE = 5e-3  # rounded log-probs may sum to a little more than 1, where the tail is cut at 0

_ARRAYS: dict[str, npt.DTypeLike] = {
    "offsets": np.int64,
    "counts": np.uint16,
    "ids": np.int32,
    "logprobs": np.float16,
    "tail": np.float32,
    "sampled": np.float32,
}
_FILL = {"offsets": -1, "counts": np.iinfo(np.uint16).max, "ids": -1}


@dataclass(frozen=True)
class TopK:
    """Ragged top-k data of the tokens of some rows, concatenated (numpy; see the module for the arrays)."""

    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float16]
    tail: npt.NDArray[np.float32]
    sampled: npt.NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.counts)

    def row(self, index: int, stop: int | None = None) -> TopK:
        """The first ``stop`` tokens (all by default) of one row, as a TopK of one row."""
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        last = last if stop is None else min(last, first + stop)
        low = int(self.counts[:first].sum(dtype=np.int64))
        high = low + int(self.counts[first:last].sum(dtype=np.int64))
        return TopK(
            offsets=np.array([0, last - first], dtype=np.int64),
            counts=self.counts[first:last],
            ids=self.ids[low:high],
            logprobs=self.logprobs[low:high],
            tail=self.tail[first:last],
            sampled=self.sampled[first:last],
        )


def prune(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    sampled: npt.NDArray[np.float32],
    row_lengths: Sequence[int],
    *,
    mass: float,
) -> TopK:
    """Keep per token the fewest leading alternatives whose mass reaches ``mass``.

    Args:
        ids, logprobs: ``[tokens, k]``, log-probs descending along the last axis.
        sampled: ``[tokens]`` log-prob of the trajectory's own token.
        row_lengths: tokens per row; their sum is ``tokens``.
        mass: in (0, 1].

    Raises:
        ValueError: shapes do not fit, log-probs are NaN, positive or not descending.
    """
    if logprobs.shape != ids.shape or len(ids) != len(sampled) or sum(row_lengths) != len(sampled):
        raise ValueError(
            f"ids {ids.shape}, logprobs {logprobs.shape}, sampled {sampled.shape} and rows of "
            f"{sum(row_lengths)} tokens in all do not fit together"
        )
    if not (sampled <= LOGPROB_SLACK).all() or not (logprobs <= LOGPROB_SLACK).all():
        raise ValueError("a teacher log-prob is NaN or positive")  # never stored as if it were an answer
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        raise ValueError("log-probs are not descending")
    rounded = logprobs.astype(np.float16)
    probabilities = np.exp(rounded.astype(np.float64))
    cumulative = np.cumsum(probabilities, axis=1)
    reached = (cumulative - probabilities) < mass
    keep = reached & np.isfinite(rounded)
    counts = keep.sum(axis=1)
    kept_mass = np.where(keep, probabilities, 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - kept_mass, 0.0))
    return TopK(
        offsets=np.concatenate([[0], np.cumsum(row_lengths)]).astype(np.int64),
        counts=counts.astype(np.uint16),
        ids=ids[keep].astype(np.int32),
        logprobs=rounded[keep],
        tail=tail.astype(np.float32),
        sampled=sampled.astype(np.float32),
    )


def concatenate(parts: Sequence[TopK]) -> TopK:
    """Join row blocks in order."""
    lengths = np.concatenate([np.diff(p.offsets) for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts]) if parts else np.zeros(0, dtype=dtype)
        for name, dtype in _ARRAYS.items()
        if name != "offsets"
    }
    return TopK(offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **joined)


def write_topk(path: Path, data: TopK) -> None:
    """Write one shard atomically."""
    # Blosc decodes a truncated chunk without complaint, hence the checksum around it.
    codecs = (BloscCodec(cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle), Crc32cCodec())
    with atomic_directory(path) as temporary:
        group = zarr.create_group(store=temporary, zarr_format=3)
        group.attrs["tropd.schema_version"] = SCHEMA_VERSION
        for name, dtype in _ARRAYS.items():
            values = np.ascontiguousarray(getattr(data, name), dtype=dtype)
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=(max(1, min(len(values), CHUNK_ELEMENTS)),),
                dtype=values.dtype,
                # Zarr reads a missing chunk as this value: it must be one that check_invariants refuses.
                fill_value=_FILL.get(name, np.nan),
                compressors=codecs,
            )
            array[...] = values


def read_topk(path: Path) -> TopK:
    """Read one shard whole and check its internal consistency.

    Raises:
        DamagedShardError: an array is missing, unreadable or inconsistent with the others.
        WorkspaceVersionError: the shard has another schema version.
    """
    try:
        group = zarr.open_group(path, mode="r")
        version = group.attrs.get("tropd.schema_version")
        if version != SCHEMA_VERSION:
            raise WorkspaceVersionError(
                f"{path} has top-k cache schema version {version}; this tropd reads version {SCHEMA_VERSION}",
                hint="use the tropd version that wrote it, or score again",
            )
        data = TopK(**{name: np.asarray(group[name][...]) for name in _ARRAYS})
    except WorkspaceVersionError:
        raise
    except Exception as error:  # zarr and its codecs raise many types for a damaged store
        raise DamagedShardError(
            f"{path} is not a readable top-k cache: {error}", hint="tropd verify finds what is damaged"
        ) from error
    problems = check_invariants(data)
    if problems:
        raise DamagedShardError(f"{path}: {'; '.join(problems)}", hint="score the stage again with --force")
    return data


def check_invariants(data: TopK, *, vocab_size: int | None = None) -> list[str]:
    """What is wrong with the arrays, in words; empty if they are consistent."""
    tokens = data.num_tokens
    alternatives = int(data.counts.sum(dtype=np.int64))
    lengths = {"ids": alternatives, "logprobs": alternatives, "tail": tokens, "sampled": tokens}
    problems = [
        f"{name} has {len(getattr(data, name))} entries, {length} are expected"
        for name, length in lengths.items()
        if len(getattr(data, name)) != length
    ]
    if len(data.offsets) == 0 or data.offsets[0] != 0 or np.any(np.diff(data.offsets) < 0):
        problems.append("offsets do not start at 0 and rise")
    elif data.offsets[-1] != tokens:
        problems.append(f"offsets end at {data.offsets[-1]}, but there are {tokens} tokens")
    if problems:
        return problems
    problems = [
        f"{name} has NaN or positive log-probs"
        for name in ("logprobs", "tail", "sampled")
        if not (getattr(data, name) <= LOGPROB_SLACK).all()
    ]
    if len(data.ids) and (data.ids.min() < 0 or (vocab_size is not None and data.ids.max() >= vocab_size)):
        problems.append("ids lie outside the vocabulary")
    token_of = np.repeat(np.arange(tokens), data.counts)
    if np.any((np.diff(data.logprobs.astype(np.float32)) > 0) & (np.diff(token_of) == 0)):
        problems.append("log-probs of a token are not descending")
    kept_mass = np.bincount(token_of, weights=np.exp(data.logprobs.astype(np.float64)), minlength=tokens)
    wrong = np.abs(kept_mass + np.exp(data.tail.astype(np.float64)) - 1.0) > MASS_TOLERANCE
    if wrong.any():
        problems.append(
            f"kept mass and tail do not add up to 1 at {wrong.sum()} tokens, first {wrong.argmax()}"
        )
    return problems
