"""The ragged top-k cache: for every token of a trajectory, the teacher's most likely alternatives.

``TopK`` is a shard in memory, the tokens of all rows concatenated in row order:

================  ========================  ==========================================================
array             dtype, length             content
================  ========================  ==========================================================
offsets           int64[rows + 1]           tokens of row r are offsets[r] : offsets[r + 1]
counts            uint16[tokens]            alternatives kept at a token
ids               int32[Σ counts]           their token ids
logprobs          float16[Σ counts]         their natural log-probs, descending within a token
tail              float32[tokens]           log of the probability mass that was not kept (-inf if none)
teacher_logprobs  float32[tokens]           log-prob of the token that the trajectory has
================  ========================  ==========================================================

As many alternatives are kept as reach the mass, at most k. ``tail`` is computed from the rounded (float16)
log-probs, so that stored kept and tail mass add up to one. Of equal log-probs the lower id is first.

On disk a shard is a Zarr v3 group with ``offsets``, ``counts``, ``tail``, ``sampled`` (the ``teacher_logprobs``) and,
encoded as ``topk_encoding`` describes, ``id_gaps``, ``codes`` and ``ceilings``. Each array is one file (Zarr's sharding
codec) of compressed chunks with a checksum each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from tropd.storage.bounds import are_logprobs
from tropd.storage.cache.topk_encoding import (
    FILL,
    Arrays,
    Precision,
    canonical_ids,
    decode_topk,
    encode_topk,
    probabilities,
)
from tropd.storage.disk.atomic import atomic_directory
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError

SCHEMA_VERSION = 2
CHUNK_ELEMENTS = 1 << 16
ZSTD_LEVEL = 3
MASS_TOLERANCE = 5e-3  # rounded log-probs may sum to a little more than 1, where the tail is cut at 0

_FIRST_LOOK = 8
_BLOCK_TOKENS = 2048
_STORED = ("offsets", "counts", "id_gaps", "codes", "ceilings", "tail", "sampled")
_DTYPES: dict[str, npt.DTypeLike] = {
    "counts": np.uint16,
    "ids": np.int32,
    "logprobs": np.float16,
    "tail": np.float32,
    "teacher_logprobs": np.float32,
}


@dataclass(frozen=True)
class TopK:
    """Ragged top-k data of the tokens of some rows, concatenated (numpy; see the module for the arrays)."""

    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float16]
    tail: npt.NDArray[np.float32]
    teacher_logprobs: npt.NDArray[np.float32]

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
            teacher_logprobs=self.teacher_logprobs[first:last],
        )


def prune(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    teacher_logprobs: npt.NDArray[np.float32],
    row_lengths: Sequence[int],
    *,
    mass: float,
) -> TopK:
    """Keep per token the fewest leading alternatives whose mass reaches ``mass``.

    Args:
        ids, logprobs: ``[tokens, k]``, log-probs descending along the last axis.
        teacher_logprobs: ``[tokens]`` log-prob of the trajectory's own token.
        row_lengths: tokens per row; their sum is ``tokens``.
        mass: in (0, 1].

    Raises:
        ValueError: shapes do not fit, log-probs are NaN, positive or not descending.
    """
    if (
        logprobs.shape != ids.shape
        or len(ids) != len(teacher_logprobs)
        or sum(row_lengths) != len(teacher_logprobs)
    ):
        raise ValueError(
            f"ids {ids.shape}, logprobs {logprobs.shape}, teacher_logprobs {teacher_logprobs.shape} and rows of "
            f"{sum(row_lengths)} tokens in all do not fit together"
        )
    if not (are_logprobs(teacher_logprobs) and are_logprobs(logprobs)):
        raise ValueError("a teacher log-prob is NaN or positive")  # never stored as if it were an answer
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        raise ValueError("log-probs are not descending")
    keep, kept_mass = _leading(logprobs, mass)
    counts = keep.sum(axis=1).astype(np.uint16)
    kept = _round(logprobs[keep])
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - kept_mass, 0.0))
    return TopK(
        offsets=np.concatenate([[0], np.cumsum(row_lengths)]).astype(np.int64),
        counts=counts,
        ids=canonical_ids(counts, ids[keep].astype(np.int32), kept),
        logprobs=kept,
        tail=tail.astype(np.float32),
        teacher_logprobs=teacher_logprobs.astype(np.float32),
    )


def _round(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    return np.minimum(logprobs, 0.0).astype(np.float16)


def _leading(
    logprobs: npt.NDArray[np.float32], mass: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Mask ``[tokens, k]`` of the kept alternatives, and their mass ``[tokens]``."""
    num_tokens, k = logprobs.shape
    keep = np.zeros((num_tokens, k), dtype=np.bool_)
    kept_mass = np.zeros(num_tokens)
    for low in range(0, num_tokens, _BLOCK_TOKENS):  # blocks whose temporaries stay in the processor's cache
        unfinished = np.arange(low, min(low + _BLOCK_TOKENS, num_tokens))
        for width in sorted({min(_FIRST_LOOK, k), k}):  # most tokens are done after a few alternatives
            rounded = _round(logprobs[unfinished, :width])
            mass_of = probabilities(rounded)
            total = np.cumsum(mass_of, axis=1)
            before = np.zeros_like(total)  # not total - mass_of: 1 + p - p can be less than 1
            before[:, 1:] = total[:, :-1]
            chosen = (before < mass) & np.isfinite(rounded)
            keep[unfinished, :width] = chosen
            kept_mass[unfinished] = mass_of.sum(axis=1, where=chosen)
            unfinished = unfinished[total[:, -1] < mass]
    return keep, kept_mass


def concatenate(parts: Sequence[TopK]) -> TopK:
    """Join row blocks in order."""
    lengths = np.concatenate([np.diff(p.offsets) for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts]) if parts else np.zeros(0, dtype=dtype)
        for name, dtype in _DTYPES.items()
    }
    return TopK(offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **joined)


def write_topk(path: Path, data: TopK, *, precision: Precision = "float16") -> None:
    """Write one shard atomically; ``topk_encoding`` says what each precision loses.

    Raises:
        ValueError: the data breaks an invariant.
        DiskError: the disk is full or failing.
    """
    if problems := check_invariants(data):
        raise ValueError(f"{path} is not written: {'; '.join(problems)}")
    arrays: Arrays = {"offsets": data.offsets, "counts": data.counts}
    arrays |= encode_topk(data.counts, data.ids, data.logprobs, data.tail, data.teacher_logprobs, precision)
    with atomic_directory(path) as temporary:
        group = zarr.create_group(store=temporary, zarr_format=3)
        group.attrs.update({"tropd.schema_version": SCHEMA_VERSION, "tropd.precision": precision})
        for name in _STORED:
            _write_array(
                group,
                name,
                arrays[name],
                FILL[name][precision] if name in ("codes", "ceilings") else FILL[name],
            )


def _write_array(group: Any, name: str, values: npt.NDArray[Any], fill: Any) -> None:
    chunks = max(1, min(len(values), CHUNK_ELEMENTS))
    # Single bytes (q8 codes) have few repetitions: a search for them costs time and makes them larger.
    level = 1 if values.dtype.itemsize == 1 else ZSTD_LEVEL
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=(chunks,),
        shards=(chunks * max(1, -(-len(values) // chunks)),),
        dtype=values.dtype,
        # Blosc decodes a truncated chunk without complaint, hence the checksum around it.
        compressors=(BloscCodec(cname="zstd", clevel=level, shuffle=BloscShuffle.shuffle), Crc32cCodec()),
        # Zarr reads a missing chunk as this value: it must be one that is refused.
        fill_value=fill,
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
                hint="use the tropd version that wrote it, or score again with --force",
            )
        arrays = {name: np.asarray(group[name][...]) for name in _STORED}
        offsets, counts = arrays["offsets"], arrays["counts"]
        if problems := _wrong_lengths(offsets, counts, arrays):
            raise ValueError("; ".join(problems))
        data = TopK(offsets, counts, **decode_topk(counts, arrays, group.attrs["tropd.precision"]))
    except WorkspaceVersionError:
        raise
    except Exception as error:  # zarr and its codecs raise many types for a damaged store
        raise DamagedShardError(
            f"{path} is not a readable top-k cache: {error}", hint="tropd verify finds the damage"
        ) from error
    if problems := check_invariants(data):
        raise DamagedShardError(f"{path}: {'; '.join(problems)}", hint="tropd verify finds the damage")
    return data


def _wrong_lengths(
    offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.uint16], arrays: Mapping[str, npt.NDArray[Any]]
) -> list[str]:
    """Arrays whose length does not follow from the offsets and counts."""
    tokens, alternatives = len(counts), int(counts.sum(dtype=np.int64))
    expected = dict.fromkeys(("ceilings", "tail", "sampled", "teacher_logprobs"), tokens)
    expected |= dict.fromkeys(("ids", "logprobs", "id_gaps", "codes"), alternatives)
    problems = [
        f"{name} has {len(values)} entries, {expected[name]} are expected"
        for name, values in arrays.items()
        if name in expected and len(values) != expected[name]
    ]
    if len(offsets) == 0 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
        problems.append("offsets do not start at 0 and rise")
    elif offsets[-1] != tokens:
        problems.append(f"offsets end at {offsets[-1]}, but there are {tokens} tokens")
    return problems


def check_invariants(data: TopK, *, vocab_size: int | None = None) -> list[str]:
    """Problems of the arrays, in words; empty if they are consistent."""
    tokens = data.num_tokens
    arrays = {name: getattr(data, name) for name in _DTYPES}
    if problems := _wrong_lengths(data.offsets, data.counts, arrays):
        return problems
    problems = [
        f"{name} has NaN or positive log-probs"
        for name in ("logprobs", "tail", "teacher_logprobs")
        if not are_logprobs(getattr(data, name))
    ]
    if len(data.ids) and (data.ids.min() < 0 or (vocab_size is not None and data.ids.max() >= vocab_size)):
        problems.append("ids lie outside the vocabulary")
    token_of = np.repeat(np.arange(tokens), data.counts)
    if np.any((np.diff(data.logprobs.astype(np.float32)) > 0) & (np.diff(token_of) == 0)):
        problems.append("log-probs of a token are not descending")
    kept_mass = np.bincount(token_of, weights=probabilities(data.logprobs), minlength=tokens)
    wrong = np.abs(kept_mass + np.exp(data.tail.astype(np.float64)) - 1.0) > MASS_TOLERANCE
    if wrong.any():
        problems.append(
            f"kept mass and tail do not add up to 1 at {wrong.sum()} tokens, first {wrong.argmax()}"
        )
    return problems
