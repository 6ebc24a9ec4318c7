"""An engine of known log-probs, which depend on the token before only; and the helpers beside this, importable."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tropd.pipeline.models.engines.base import SequenceScores, everywhere

sys.path.insert(0, str(Path(__file__).parent))

V = 24


class TableEngine:
    """Looks log-probs up in a table ``[previous token, next token]``; sequences with token 22 get NaN, with 23 fail.

    ``gate`` holds it back while it is clear, ``entered`` says that it is inside ``score``.
    """

    vocab_size = V
    max_length = 64

    def __init__(self) -> None:
        logits = np.random.default_rng(0).normal(scale=2.0, size=(V, V))
        self.table = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        self.calls: list[list[list[int]]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def expected(self, tokens: Sequence[int], start: int) -> npt.NDArray[np.float32]:
        """What ``score`` gives for the tokens from ``start``."""
        return self.table[list(tokens)[start - 1 : -1], list(tokens)[start:]]

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        k: int = 0,
        entropy: bool = False,
        topk_where: Any = everywhere,
        vocab_limit: int | None = None,
    ) -> list[SequenceScores]:
        """See ``Engine.score``."""
        self.entered.set()
        assert self.gate.wait(20)
        self.calls.append([list(tokens) for tokens in sequences])
        if any(23 in tokens for tokens in sequences):
            raise RuntimeError("the engine is unhappy")
        return [
            self._score(i, list(tokens), start, min(k, vocab_limit or V), entropy, topk_where)
            for i, (tokens, start) in enumerate(zip(sequences, starts, strict=True))
        ]

    def _score(
        self, index: int, tokens: list[int], start: int, k: int, entropy: bool, topk_where: Any
    ) -> SequenceScores:
        rows = self.table[tokens[start - 1 : -1]]
        sampled = self.expected(tokens, start) + np.float32(np.nan if 22 in tokens else 0.0)
        entropies = -(np.exp(rows) * rows).sum(1) if entropy else None
        positions = np.flatnonzero(topk_where(index, sampled, entropies)) if k else np.zeros(0, np.int64)
        ids = np.argsort(-rows[positions], axis=1)[:, :k].astype(np.int32)
        logprobs = np.take_along_axis(rows[positions], ids, 1)
        return SequenceScores(sampled, entropies, positions, ids, logprobs)


@pytest.fixture
def table_engine() -> Any:
    return TableEngine()
