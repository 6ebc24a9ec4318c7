"""The student's own alternatives: the k likeliest ids at each token of its response, before the teacher is asked.

They come from one more pass of the engine that has sampled, with the weights that it has sampled with: a prefill, which
costs little beside decoding, and holds logits of some positions at a time (``engines.scoring``). The log-probs of these
ids are not kept: the loss takes them from the trainer's own pass, with their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tropd.pipeline.models.engines.base import Choose, IdTable
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.training.rollout.rows import ChooseIds, Row


def choosing(choose: Choose, k: int, vocab_limit: int) -> ChooseIds:
    """Gives sequences the ``k`` likeliest ids below ``vocab_limit`` at each token from their starts."""

    def chosen(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[IdTable]:
        with within_memory(
            "the student's likeliest ids of a step", "lower rollout.batch_size or objective.k"
        ):
            return choose(sequences, starts, k, vocab_limit)

    return chosen


def all_chosen_ids(rows: Sequence[Row]) -> IdTable:
    """``[T, c]`` the ids of all rows, in their order; ``[0, 0]`` where none has any."""
    parts = [row.chosen_ids for row in rows if row.chosen_ids is not None]
    return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.int32)
