"""Distances of student and teacher per token: KL from a response's author to the other, and acceptance.

Of a position with the distributions p of the writer and q of the other, exactly over all tokens: KL(p‖q) =
Σ_v p(v)·[log p(v) - log q(v)] and acceptance Σ_v min(p(v), q(v)), which is 1 less their total-variation distance. On the
student's responses that KL is the reverse KL, on the teacher's the forward KL.

Where the teacher is not in this process, on the student's responses the sampled token's log π_S - log π_T (K1) and
min(1, π_T/π_S), whose expectations these are; on the teacher's the KL between the two (k+1)-way distributions of its k
likeliest tokens and the rest, a lower bound of the forward KL.

Legend: n tokens of a response · k alternatives · V vocabulary. Results are float64; logarithms are natural (nats).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.models.engines.scoring import LOGIT_ELEMENTS, LOGIT_ELEMENTS_ON_CPU, batches_of
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import vocabulary_sums
from tropd.pipeline.models.output.logprobs import Lookups, token_logprobs
from tropd.pipeline.models.output.output_layer import SplitModel, is_plain, workspace
from tropd.pipeline.models.runtime import to_device
from tropd.pipeline.objectives.loss import floored_log_ratio
from tropd.pipeline.teacher.wire.messages import log_tail
from tropd.storage.arrays import Floats64

LEAST = -1e4
"""Log-prob of a token to which a model gives no probability at all: KLs stay finite."""


@dataclass(frozen=True)
class TokenDistances:
    """Of the n tokens of one response."""

    kl: Floats64
    """``[n]`` from the writer's distribution to the other's."""
    acceptance: Floats64 | None
    """``[n]``; None where it is not known."""
    entropy: Floats64 | None
    """``[n]`` of the writer's distribution."""


@dataclass(frozen=True)
class DenseTopk:
    """The teacher's likeliest tokens at the n positions of a response."""

    ids: npt.NDArray[np.int32]
    """``[n, k]``, no id twice at a position."""
    logprobs: npt.NDArray[np.float32]
    """``[n, k]``."""


def exact_distances(
    writer: TransformersEngine,
    other: TransformersEngine,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_tokens: int,
    told: tuple[Sequence[Sequence[int]], Sequence[int]] | None = None,
) -> list[TokenDistances]:
    """Over all tokens, for responses ``sequence[start:]`` of ``writer``.

    Both models must have the same tokens. Logits are made some positions at a time.

    Args:
        batch_tokens: tokens, padding included, that go through the models together.
        told: sequences and starts as ``other`` reads them, if not these: the same responses after other prompts.

    Raises:
        ValueError: a sequence that an engine does not take, or other numbers of tokens.
    """
    if writer.vocab_size != other.vocab_size:
        raise ValueError(f"one model has {writer.vocab_size} tokens, the other {other.vocab_size}")
    found: list[TokenDistances | None] = [None] * len(sequences)
    for batch in batches_of(sequences, batch_tokens):
        rows, firsts = [sequences[i] for i in batch], [starts[i] for i in batch]
        there = (rows, firsts) if told is None else ([told[0][i] for i in batch], [told[1][i] for i in batch])
        with writer.states(rows, firsts) as (_, own), other.states(*there) as (_, theirs):
            values = _compare(writer.split, other.split, own, theirs.to(own.device), writer.vocab_size)
        ends = np.cumsum([len(row) - first for row, first in zip(rows, firsts, strict=True)])[:-1]
        for i, kl, acceptance, entropy in zip(batch, *(np.split(v, ends) for v in values), strict=True):
            found[i] = TokenDistances(kl, acceptance, entropy)
    return [one for one in found if one is not None]


def _compare(
    writer: SplitModel, other: SplitModel, own: Tensor, theirs: Tensor, tokens: int
) -> tuple[Floats64, Floats64, Floats64]:
    """KLs, acceptances and entropies ``[n]`` from states ``[n, ·]`` of both."""
    elements = LOGIT_ELEMENTS_ON_CPU if own.device.type == "cpu" else LOGIT_ELEMENTS
    size = max(1, elements // (2 * max(writer.vocabulary(own), other.vocabulary(theirs))))
    spaces = [
        workspace(min(size, len(own)), split.head.weight) if is_plain(split.head) else None
        for split in (writer, other)
    ]
    kl, acceptance, entropy = (own.new_empty(len(own), dtype=torch.float32) for _ in range(3))
    for low in range(0, len(own), size):
        rows = slice(low, low + size)
        p, q = (
            _logprobs(split, states[rows], space, tokens)
            for split, states, space in zip((writer, other), (own, theirs), spaces, strict=True)
        )
        for block in vocabulary_sums.row_blocks(p):
            mass = p[block].exp()
            torch.sum(mass * (p[block] - q[block]), dim=-1, out=kl[rows][block])
            torch.sum(mass * p[block], dim=-1, out=entropy[rows][block])
            torch.sum(torch.minimum(mass, q[block].exp()), dim=-1, out=acceptance[rows][block])
        del p, q  # without a workspace, they would stay until the next are made
    return _floats(kl.clamp_(min=0.0)), _floats(acceptance.clamp_(max=1.0)), _floats(entropy.neg_())


def _logprobs(split: SplitModel, states: Tensor, space: Tensor | None, tokens: int) -> Tensor:
    """``[c, tokens]`` log-probs that may lie in ``space``."""
    logits = split.own_logits(states, space)[:, :tokens]
    return vocabulary_sums.log_softmax_(logits, logits.new_empty(len(logits))).clamp_(min=LEAST)


def sampled_distances(
    student_logprobs: npt.NDArray[np.float32],
    teacher_logprobs: npt.NDArray[np.float32],
    entropy: npt.NDArray[np.float32] | None = None,
) -> TokenDistances:
    """From log-probs ``[n]`` of a response that the student sampled at temperature 1."""
    ratio = floored_log_ratio(teacher_logprobs, student_logprobs)
    return TokenDistances(
        -ratio, np.exp(np.minimum(ratio, 0.0)), None if entropy is None else entropy.astype(np.float64)
    )


def topk_distances(
    student: TransformersEngine,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    alternatives: Sequence[DenseTopk],
    *,
    batch_tokens: int,
) -> list[TokenDistances]:
    """Of responses ``sequence[start:]`` of the teacher, from its alternatives at each of their tokens.

    Raises:
        ValueError: a sequence that the engine does not take.
    """
    found: list[TokenDistances | None] = [None] * len(sequences)
    for batch in batches_of(sequences, batch_tokens):
        rows, firsts = [sequences[i] for i in batch], [starts[i] for i in batch]
        asked = [alternatives[i] for i in batch]
        ids = np.concatenate([one.ids.reshape(-1) for one in asked]).astype(np.int64)
        counts = np.concatenate([np.full(len(one.ids), one.ids.shape[1]) for one in asked])
        with student.states(rows, firsts) as (targets, states):
            lookups = Lookups(torch.from_numpy(counts), to_device(ids, states.device), tail=True)
            logprobs = token_logprobs(student.split, states, targets, lookups)
        own, tails = _floats(logprobs.lookups), _floats(logprobs.tail)
        first = 0
        for i, one in zip(batch, asked, strict=True):
            n, k = one.ids.shape
            mine, rest = own[: n * k].reshape(n, k), tails[first : first + n]
            own, first = own[n * k :], first + n
            found[i] = TokenDistances(_forward(one.logprobs, mine, rest), None, None)
    return [one for one in found if one is not None]


def _forward(teacher: npt.NDArray[np.float32], student: Floats64, student_tail: Floats64) -> Floats64:
    """``[n]`` KLs of alternatives ``[n, k]`` and the rest; nothing is added where no token is left."""
    logprobs = teacher.astype(np.float64)
    kl = (np.exp(logprobs) * (logprobs - np.maximum(student, LEAST))).sum(axis=-1)
    tail = log_tail(teacher).astype(np.float64)
    left = np.isfinite(tail) & np.isfinite(student_tail)
    kl[left] += np.exp(tail[left]) * (tail[left] - student_tail[left])
    return np.maximum(kl, 0.0)


def _floats(values: Tensor) -> Floats64:
    array: Floats64 = values.double().cpu().numpy()
    return array
