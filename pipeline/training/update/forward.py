"""A micro-batch through the student, with the teacher's alternatives beside it, and what is measured there.

Of a GPU nothing is asked here: the host knows sizes and places, and fetches numbers once, at the end of a step.

Legend: n supervised positions of the micro-batch, of which t are student and g guidance (prefix) tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tropd.pipeline.models.output.logprobs import Lookups, TokenLogprobs
from tropd.pipeline.models.runtime import autocast, to_device, to_host
from tropd.pipeline.objectives.estimators import Alternatives
from tropd.pipeline.training.update.micro_batches import MicroBatch, RaggedTopk
from tropd.pipeline.training.update.student import StudentPass
from tropd.storage.arrays import Floats64, Ints


@dataclass(frozen=True)
class Passed:
    """A micro-batch after its pass."""

    tokens: Ints
    """``[t]`` numbers of its student tokens in the step."""
    output: TokenLogprobs
    """Of all n positions."""
    students: Tensor
    """``[t]`` places of the student tokens among the n."""
    prefixes: Tensor
    """``[g]`` likewise."""
    topk: RaggedTopk
    """Alternatives of the student tokens: the teacher's, or those that the student chose."""
    alternatives: Alternatives
    """The same with the student's log-probs of them."""
    guidance: Alternatives | None
    """Cached alternatives of all guidance tokens, where the objective learns from them."""


def pass_through(
    student: StudentPass,
    micro_batch: MicroBatch,
    topk: RaggedTopk,
    guidance_topk: RaggedTopk | None,
    *,
    tail: bool,
) -> Passed:
    """The student's pass over a micro-batch.

    Args:
        topk: the teacher's alternatives of the step's student tokens.
        guidance_topk: cached alternatives of its guidance tokens.
        tail: whether the student's mass outside them is wanted.
    """
    device, is_student = micro_batch.targets.device, micro_batch.is_student
    mine = topk.select(micro_batch.student_tokens)
    cached = None if guidance_topk is None else guidance_topk.select(micro_batch.guidance_tokens)
    students, prefixes = np.flatnonzero(is_student), np.flatnonzero(~is_student)
    # Lookups go in the order of the positions: per row first guidance, then student tokens.
    counts = np.zeros(len(is_student), dtype=np.int64)
    counts[students[mine.index]] = mine.counts
    if cached is not None:
        counts[prefixes[cached.index]] = cached.counts
    of_students = np.repeat(is_student, counts)
    ids = np.zeros(len(of_students), dtype=np.int64)
    ids[of_students] = mine.ids
    if cached is not None:
        ids[~of_students] = cached.ids
    with autocast(device, student.precision):
        lookups = Lookups(torch.from_numpy(counts), to_device(ids, device), tail)
        output = TokenLogprobs(*student(micro_batch, lookups))

    def alternatives(given: RaggedTopk, places: Ints, entries: Ints) -> Alternatives:
        dtype = output.lookups.dtype
        return Alternatives(
            teacher_logprobs=to_device(given.logprobs, device).to(dtype),
            student_logprobs=output.lookups[to_device(entries, device)],
            counts=to_device(given.counts, device),
            teacher_tail=to_device(given.tail, device).to(dtype),
            student_tail=output.tail[to_device(places[given.index], device)],
        )

    return Passed(
        tokens=micro_batch.student_tokens,
        output=output,
        students=to_device(students, device),
        prefixes=to_device(prefixes, device),
        topk=mine,
        alternatives=alternatives(mine, students, np.flatnonzero(of_students)),
        guidance=None if cached is None else alternatives(cached, prefixes, np.flatnonzero(~of_students)),
    )


def with_drawn(passed: Passed, micro_batch: MicroBatch) -> Alternatives:
    """The alternatives of the student tokens, and whether the token that was drawn is among them."""
    found, topk = passed.alternatives, passed.topk
    device = micro_batch.targets.device
    drawn = micro_batch.targets[passed.students][to_device(topk.index, device)]
    same = (to_device(topk.ids, device) == found.spread(drawn)).to(found.student_logprobs.dtype)
    return replace(found, holds_drawn=found.sum(same) > 0)


def pass_idly(student: StudentPass, micro_batch: MicroBatch) -> Tensor:
    """A pass whose result is 0: other processes have one more, and weights are gathered by all or none."""
    with autocast(micro_batch.targets.device, student.precision):
        targets, *_ = student(micro_batch, Lookups.none(micro_batch.targets))
    return 0.0 * targets.sum()


class Measured:
    """Numbers of a step's T tokens. They stay where they are until all are fetched, with one wait."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._parts: list[tuple[str, Ints, Tensor]] = []

    def add(self, name: str, tokens: Ints, values: Tensor) -> None:
        """These tokens' values ``[t]``."""
        self._parts.append((name, tokens, values.detach()))

    def fetch(self) -> dict[str, Floats64]:
        """Every name's values ``[T]``; NaN where none was added, also of a name that never was."""
        found: dict[str, Floats64] = defaultdict(lambda: np.full(self._total, np.nan))
        arrays = to_host(*(values for _, _, values in self._parts))
        for (name, tokens, _), array in zip(self._parts, arrays, strict=True):
            found[name][tokens] = array
        return found
