"""The trainer's view of the top-k cache: what the teacher said of stored tokens, with no teacher alive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from tropd.pipeline.training.batch import RaggedTopk
from tropd.pipeline.training.rollouts import Row, TrajectoryStore
from tropd.pipeline.training.teacher_data import TeacherData
from tropd.storage.errors import DamagedShardError
from tropd.storage.manifest import Manifest, check_shard
from tropd.storage.topk_cache import TopK, read_topk


class CachedScores:
    """Reads the scores stage; every shard is checked against its checksum when first read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._shard = lru_cache(maxsize=8)(self._read)

    def _read(self, name: str) -> TopK:
        shard = self._manifest.shards.get(name)
        if shard is None:
            raise DamagedShardError(
                f"{self._folder / name} is not in the manifest", hint="rerun tropd score-teacher"
            )
        check_shard(self._folder, shard)
        return read_topk(self._folder / name)

    def prefixes(self, rows: Sequence[Row], store: TrajectoryStore, k: int) -> RaggedTopk:
        """The k likeliest cached alternatives of all prefix tokens of a step, numbered in row order."""
        lengths = [len(row.plan.prefix_tokens) for row in rows]
        return _limited(self._parts(rows, lengths, store), k)

    def responses(self, rows: Sequence[Row], store: TrajectoryStore, k: int) -> TeacherData:
        """The teacher's view of stored student rollouts: log-probs and the k likeliest alternatives of every token."""
        parts = self._parts(rows, [len(row.tokens) for row in rows], store)
        if not parts:
            return TeacherData.nothing()
        return TeacherData(np.concatenate([p.sampled for p in parts]), None, _limited(parts, k))

    def _parts(self, rows: Sequence[Row], lengths: Sequence[int], store: TrajectoryStore) -> list[TopK]:
        """The first tokens of each row's trajectory."""
        parts = []
        for row, length in zip(rows, lengths, strict=True):
            if row.plan.trajectory is not None and length:
                name, place = store.location(row.plan.trajectory)
                parts.append(self._shard(f"{Path(name).stem}.zarr").row(place, stop=length))
        return parts


def _limited(parts: Sequence[TopK], k: int) -> RaggedTopk:
    """At most k alternatives per token, the likeliest; tokens are numbered in order."""
    if not parts:
        return RaggedTopk.empty()
    counts = np.concatenate([p.counts for p in parts]).astype(np.int64)
    logprobs = np.concatenate([p.logprobs for p in parts]).astype(np.float32)
    tail = np.concatenate([p.tail for p in parts])
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = rank < k
    if not keep.all():
        # What is cut off joins the tail.
        cut = np.bincount(
            np.repeat(np.arange(len(counts)), counts)[~keep], np.exp(logprobs[~keep]), len(counts)
        )
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(tail.astype(np.float64)) + cut).astype(np.float32)
    return RaggedTopk(
        index=np.arange(len(counts)),
        counts=np.minimum(counts, k),
        ids=np.concatenate([p.ids for p in parts]).astype(np.int64)[keep],
        logprobs=logprobs[keep],
        tail=tail,
    )
