"""From rows to tensors: the flat numbering of a step's tokens, and padded micro-batches of it.

Legend: R rows · T student tokens of the step, in row order · G guidance (prefix) tokens · B rows, W width of a
micro-batch · n its supervised positions, per row first guidance, then student tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tropd.pipeline.training.rollouts import Row

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RaggedTopk:
    """Alternatives of some tokens: ``index`` ``[M]`` says which (rising), ``counts`` ``[M]`` how many each has."""

    index: Ints
    counts: Ints
    ids: Ints
    """``[A]``."""
    logprobs: Floats32
    """``[A]`` the teacher's."""
    tail: Floats32
    """``[M]`` log of the teacher's remaining mass."""

    @staticmethod
    def empty() -> RaggedTopk:
        integers, floats = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return RaggedTopk(integers, integers, integers, floats, floats)

    def select(self, wanted: Ints) -> RaggedTopk:
        """The alternatives of the tokens ``wanted`` ``[w]``, in that order; ``index`` then counts within ``wanted``."""
        place = np.searchsorted(self.index, wanted)
        found = np.zeros(len(wanted), dtype=np.bool_)
        inside = place < len(self.index)
        found[inside] = self.index[place[inside]] == wanted[inside]
        chosen = place[found]
        lengths = self.counts[chosen]
        first = (np.cumsum(self.counts) - self.counts)[chosen]
        picks = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return RaggedTopk(
            index=np.flatnonzero(found),
            counts=lengths,
            ids=self.ids[picks],
            logprobs=self.logprobs[picks],
            tail=self.tail[chosen],
        )


@dataclass(frozen=True)
class Layout:
    """Where each row's tokens are in the step's flat numbering."""

    rows: Sequence[Row]
    guided: bool
    """Whether prefix tokens are supervised."""

    @property
    def student_counts(self) -> Ints:
        return np.array([len(r.tokens) for r in self.rows], dtype=np.int64)

    @property
    def guidance_counts(self) -> Ints:
        counts = [len(r.plan.prefix_tokens) if self.guided else 0 for r in self.rows]
        return np.array(counts, dtype=np.int64)

    @property
    def student_rows(self) -> Ints:
        """``[T]`` row of each student token."""
        return np.repeat(np.arange(len(self.rows)), self.student_counts)

    @property
    def guidance_rows(self) -> Ints:
        """``[G]`` row of each guidance token."""
        return np.repeat(np.arange(len(self.rows)), self.guidance_counts)

    @property
    def groups(self) -> Ints:
        """``[T]`` prompt (slot) of each student token."""
        return np.array([r.plan.slot for r in self.rows], dtype=np.int64)[self.student_rows]


@dataclass(frozen=True)
class MicroBatch:
    """A right-padded batch of some rows and its supervised positions."""

    ids: torch.Tensor
    """``[B, W]``."""
    mask: torch.Tensor
    """``[B, W]`` 1 for tokens."""
    row_index: torch.Tensor
    """``[n]`` row in the batch of each supervised position."""
    column_index: torch.Tensor
    """``[n]`` column of the hidden state that predicts it."""
    targets: torch.Tensor
    """``[n]`` token ids."""
    is_student: npt.NDArray[np.bool_]
    """``[n]`` written by the student (else guidance)."""
    student_tokens: Ints
    """``[t]`` their numbers in the step's T tokens, in order."""
    guidance_tokens: Ints
    """``[g]`` likewise in G."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def micro_batches(
    layout: Layout, budget: int, device: torch.device, share: tuple[int, int] = (0, 1)
) -> Iterator[MicroBatch]:
    """Rows with supervised tokens, longest last, cut into batches of at most ``budget`` padded tokens.

    Args:
        share: (r, n): of these rows, ordered by length, only every n-th from the r-th.
    """
    students, guidance = layout.student_counts, layout.guidance_counts
    lengths = [len(r.sequence) for r in layout.rows]
    order = sorted((i for i in range(len(lengths)) if students[i] + guidance[i]), key=lambda i: lengths[i])
    order = order[share[0] :: share[1]]
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * lengths[i] > budget:
            yield _micro_batch(layout, group, device)
            group = []
        group.append(i)
    if group:
        yield _micro_batch(layout, group, device)


def _micro_batch(layout: Layout, group: Sequence[int], device: torch.device) -> MicroBatch:
    students, guidance = layout.student_counts, layout.guidance_counts
    student_first = np.concatenate([[0], np.cumsum(students)])
    guidance_first = np.concatenate([[0], np.cumsum(guidance)])
    width = max(len(layout.rows[i].sequence) for i in group)
    ids = np.zeros((len(group), width), dtype=np.int64)
    mask = np.zeros((len(group), width), dtype=np.int64)
    rows, columns, is_student, student_tokens, guidance_tokens = [], [], [], [], []
    for b, i in enumerate(group):
        row = layout.rows[i]
        sequence = row.sequence
        ids[b, : len(sequence)] = sequence
        mask[b, : len(sequence)] = 1
        first = len(row.context) - int(guidance[i])
        positions = np.arange(first, len(sequence))
        rows.append(np.full(len(positions), b))
        columns.append(positions - 1)
        is_student.append(positions >= len(row.context))
        student_tokens.append(np.arange(student_first[i], student_first[i + 1]))
        guidance_tokens.append(np.arange(guidance_first[i], guidance_first[i + 1]))
    row_index, column_index = np.concatenate(rows), np.concatenate(columns)
    return MicroBatch(
        ids=torch.from_numpy(ids).to(device),
        mask=torch.from_numpy(mask).to(device),
        row_index=torch.from_numpy(row_index).to(device),
        column_index=torch.from_numpy(column_index).to(device),
        targets=torch.from_numpy(ids[row_index, column_index + 1]).to(device),
        is_student=np.concatenate(is_student),
        student_tokens=np.concatenate(student_tokens),
        guidance_tokens=np.concatenate(guidance_tokens),
    )
