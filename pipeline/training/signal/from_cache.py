"""The trainer's view of the top-k cache: stored scores of stored tokens, with no teacher running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tropd.pipeline.training.rollout.rows import Row
from tropd.pipeline.training.signal.ask_teacher import TeacherData
from tropd.pipeline.training.update.micro_batches import RaggedTopk
from tropd.storage.cache.shard import TopK
from tropd.storage.cache.topk_reader import Span, TopKReader
from tropd.storage.formats.trajectory_store import TrajectoryStore
from tropd.storage.stage.manifest import Manifest


class CachedScores:
    """Reads a scores stage; every shard is checked against its checksum when first read.

    Args:
        num_tokens: ids that the student's tokenizer has; earlier versions have cached others.
    """

    def __init__(self, folder: Path, manifest: Manifest, num_tokens: int) -> None:
        self._reader = TopKReader(folder, manifest)
        self._num_tokens = num_tokens

    def prefixes(self, rows: Sequence[Row], store: TrajectoryStore, k: int) -> RaggedTopk:
        """The k likeliest cached alternatives of all prefix tokens of a step, numbered in row order."""
        lengths = [len(row.plan.prefix_tokens) for row in rows]
        return limited(self._read(rows, lengths, store), k, self._num_tokens)

    def responses(self, rows: Sequence[Row], store: TrajectoryStore, k: int) -> TeacherData:
        """The teacher's view of stored student rollouts: log-probs and the k likeliest alternatives of every token."""
        data = self._read(rows, [len(row.tokens) for row in rows], store)
        return TeacherData(data.teacher_logprobs, None, limited(data, k, self._num_tokens))

    def _read(self, rows: Sequence[Row], lengths: Sequence[int], store: TrajectoryStore) -> TopK:
        """The first tokens of each row's trajectory, in row order."""
        spans = []
        for row, length in zip(rows, lengths, strict=True):
            if row.plan.trajectory is not None and length:
                name, place = store.location(row.plan.trajectory)
                spans.append(Span(f"{Path(name).stem}.zarr", place, 0, length))
        return self._reader.read(spans)


def limited(data: TopK, k: int, num_tokens: int) -> RaggedTopk:
    """At most k alternatives per token, the likeliest that are tokens; tokens are numbered in order.

    The mass that is cut off joins the tail.
    """
    counts, tail = data.counts.astype(np.int64), data.tail
    logprobs = data.logprobs.astype(np.float32)
    known = data.ids < num_tokens
    before = np.concatenate([[0], np.cumsum(known)])
    rank = before[:-1] - np.repeat(before[np.cumsum(counts) - counts], counts)
    keep = known & (rank < k)
    if not keep.all():
        token = np.repeat(np.arange(len(counts)), counts)
        cut = np.bincount(token[~keep], np.exp(logprobs[~keep].astype(np.float64)), len(counts))
        counts = np.bincount(token[keep], minlength=len(counts))
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(tail.astype(np.float64)) + cut).astype(np.float32)
    return RaggedTopk(
        index=np.arange(len(counts)),
        counts=counts,
        ids=data.ids.astype(np.int64)[keep],
        logprobs=logprobs[keep],
        tail=tail,
    )
