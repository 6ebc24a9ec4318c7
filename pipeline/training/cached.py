"""The trainer's view of the top-k cache: alternatives of the prefix tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from tropd.pipeline.training.batch import RaggedTopk
from tropd.pipeline.training.rollouts import Row, TrajectoryStore
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
        parts: list[TopK] = []
        for row in rows:
            if row.plan.trajectory is not None:
                name, place = store.location(row.plan.trajectory)
                data = self._shard(f"{Path(name).stem}.zarr")
                parts.append(data.row(place, stop=len(row.plan.prefix_tokens)))
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
