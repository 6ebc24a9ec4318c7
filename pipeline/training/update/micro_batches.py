"""From rows to tensors: the flat numbering of a step's tokens, and micro-batches of it, packed or padded.

Packed, several rows stand one after another in a line of the micro-batch, each with positions from 0: models that
understand this (``student.packing``) attend within a row only, and little is padded. Otherwise each row has its line.

Legend: R rows · T student tokens of the step, in row order · G guidance (prefix) tokens · B lines, W width of a
micro-batch · n its supervised positions, per row first guidance, then student tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tropd.pipeline.models.runtime import to_device
from tropd.pipeline.training.rollout.rows import Row
from tropd.storage.arrays import Floats32, Ints

Packing = Literal["padded", "lines", "one line"]
"""One row per line; lines as long as the longest row, since a mask grows with its square; or all rows in one line."""


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
    """Places of each row's tokens in the step's flat numbering."""

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
    """Some rows and their supervised positions."""

    inputs: dict[str, torch.Tensor]
    """Inputs of the model: ``input_ids`` ``[B, W]``, and ``attention_mask`` (padded) or ``position_ids`` (packed)."""
    row_index: torch.Tensor
    """``[n]`` line of each supervised position."""
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
    row_lengths: tuple[int, ...]
    """Tokens of the rows in the lines, one after another; of a line's padding too, as if that were a row."""


def longest_row(rows: Sequence[Row]) -> int:
    """Tokens of the longest."""
    return max((len(row.sequence) for row in rows), default=0)


def micro_batches(
    layout: Layout,
    budget: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    *,
    packing: Packing = "padded",
) -> Iterator[MicroBatch]:
    """Rows with supervised tokens, longest first, in batches of at most ``budget`` tokens, padding included.

    Args:
        share: (r, n): of these rows, ordered by length, only every n-th from the r-th.
        packing: how rows are put into lines.
    """
    students, guidance = layout.student_counts, layout.guidance_counts
    lengths = [len(r.sequence) for r in layout.rows]
    left = sorted((i for i in range(len(lengths)) if students[i] + guidance[i]), key=lambda i: -lengths[i])
    left = left[share[0] :: share[1]]
    while left:
        lines, left = fill_lines(left, lengths, budget, packing)
        yield _micro_batch(layout, lines, device, packed=packing != "padded")


def fill_lines(
    rows: Sequence[int], lengths: Sequence[int], budget: int, packing: Packing
) -> tuple[list[list[int]], list[int]]:
    """Lines of one micro-batch, and the rows that found no room (first fit)."""
    width = max(lengths[rows[0]], budget) if packing == "one line" else lengths[rows[0]]
    most = max(1, budget // width)
    lines: list[list[int]] = []
    room: list[int] = []
    left = []
    for i in rows:
        fits = (n for n, free in enumerate(room) if free >= lengths[i])
        place = None if packing == "padded" else next(fits, None)
        if place is not None:
            lines[place].append(i)
            room[place] -= lengths[i]
        elif len(lines) < most:
            lines.append([i])
            room.append(width - lengths[i])
        else:
            left.append(i)
    return lines, left


def _micro_batch(
    layout: Layout, lines: Sequence[Sequence[int]], device: torch.device, *, packed: bool
) -> MicroBatch:
    students, guidance = layout.student_counts, layout.guidance_counts
    student_first = np.concatenate([[0], np.cumsum(students)])
    guidance_first = np.concatenate([[0], np.cumsum(guidance)])
    width = max(sum(len(layout.rows[i].sequence) for i in line) for line in lines)
    ids = np.zeros((len(lines), width), dtype=np.int64)
    mask = np.zeros((len(lines), width), dtype=np.int64)
    # Padding is a separate row, whose tokens are never looked at.
    position_ids = np.tile(np.arange(width), (len(lines), 1))
    rows, columns, is_student, student_tokens, guidance_tokens = [], [], [], [], []
    lengths: list[int] = []
    for b, line in enumerate(lines):
        begin = 0
        for i in line:
            row = layout.rows[i]
            sequence = row.sequence
            end = begin + len(sequence)
            ids[b, begin:end] = sequence
            mask[b, begin:end] = 1
            position_ids[b, begin:] = np.arange(width - begin)
            first = len(row.context) - int(guidance[i])
            positions = np.arange(first, len(sequence))
            rows.append(np.full(len(positions), b))
            columns.append(begin + positions - 1)
            is_student.append(positions >= len(row.context))
            student_tokens.append(np.arange(student_first[i], student_first[i + 1]))
            guidance_tokens.append(np.arange(guidance_first[i], guidance_first[i + 1]))
            lengths.append(len(sequence))
            begin = end
        position_ids[b, begin:] = np.arange(width - begin)
        lengths += [width - begin] if begin < width else []
    row_index, column_index = np.concatenate(rows), np.concatenate(columns)
    extra = {"position_ids": position_ids} if packed else {"attention_mask": mask}
    return MicroBatch(
        inputs={name: to_device(array, device) for name, array in ({"input_ids": ids} | extra).items()},
        row_index=to_device(row_index, device),
        column_index=to_device(column_index, device),
        targets=to_device(ids[row_index, column_index + 1], device),
        is_student=np.concatenate(is_student),
        student_tokens=np.concatenate(student_tokens),
        guidance_tokens=np.concatenate(guidance_tokens),
        row_lengths=tuple(lengths),
    )
