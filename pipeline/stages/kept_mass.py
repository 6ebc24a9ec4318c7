"""Probability mass that a cache keeps, and the k for more: measured on a few tokens, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tropd.pipeline.models.engines.base import Engine
from tropd.storage.cache.shard import TopK
from tropd.storage.formats.trajectories import Trajectory

LOW = 0.95
"""Kept mass below which a warning is given."""
WANTED = 0.99
POSITIONS = 32
"""Tokens that are looked at; each takes the vocabulary's log-probs."""


def kept_mass(data: TopK) -> float:
    """Mean probability of the alternatives that are kept per token."""
    return float(np.exp(data.logprobs.astype(np.float64)).sum()) / max(data.num_tokens, 1)


def needed_alternatives(engine: Engine, rows: Sequence[Trajectory], wanted: float = WANTED) -> int:
    """The smallest k whose alternatives hold ``wanted`` of the probability, on the mean of some tokens of these rows."""
    chosen = [row for row in rows if row.tokens][:POSITIONS]
    each = max(1, POSITIONS // max(len(chosen), 1))

    def some(
        index: int, token_logprobs: npt.NDArray[np.float32], entropy: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.bool_]:
        where = np.zeros(len(token_logprobs), dtype=np.bool_)
        where[np.linspace(0, len(token_logprobs) - 1, min(each, len(token_logprobs))).astype(int)] = True
        return where

    sequences = [[*row.prompt_tokens, *row.tokens] for row in chosen]
    starts = [len(row.prompt_tokens) for row in chosen]
    scores = engine.score(sequences, starts, k=engine.vocab_size, topk_where=some)
    mass = np.concatenate([np.exp(s.topk_logprobs.astype(np.float64)).cumsum(axis=1) for s in scores]).mean(
        axis=0
    )
    return min(int(np.searchsorted(mass, wanted)) + 1, len(mass))


def low_mass_warning(kept: float, k: int, needed: int, most: int) -> str:
    """The warning about a cache that keeps little.

    Args:
        needed: see ``needed_alternatives``.
        most: the largest k that the configuration takes.
    """
    more = (
        f"{WANTED:.0%} would take scores.k = {needed}"
        if needed <= most
        else f"{WANTED:.0%} would take {needed:,}"
    )
    return (
        f"scores.k = {k} keeps {kept:.1%} of the teacher's probability; {more} (measured on {POSITIONS} tokens of the "
        'first shard). Losses of the cached alternatives do not see the rest, unless their support is "tail"'
    )
