"""Log-probs, entropies and top-k from hidden states, some positions at a time.

Legend: n positions · H hidden size · V vocabulary · k alternatives per position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tropd.pipeline.models.engines.base import ChosenScores
from tropd.pipeline.models.output import vocabulary_sums
from tropd.pipeline.models.output.output_layer import SplitModel, is_plain, workspace
from tropd.pipeline.models.runtime import to_device, to_host

LOGIT_ELEMENTS = 1 << 26
"""Logits held at once: 2^26 float32 numbers, 256 MiB."""
LOGIT_ELEMENTS_ON_CPU = 1 << 23
"""The same on a CPU: 32 MiB, which its caches may hold."""


@dataclass(frozen=True)
class HeadScores:
    """Scores of each position. Everything is float32, log-probs are at most 0."""

    token_logprobs: Tensor
    """``[n]`` log-probs of the targets."""
    norms: Tensor
    """``[n]`` log-sum-exps of the logits."""
    entropies: Tensor | None
    """``[n]`` in nats."""
    top_ids: Tensor
    """``[n, k]`` int64, likeliest first."""
    top_logprobs: Tensor
    """``[n, k]``."""
    chosen: ChosenHeadScores | None = None
    """Of the ids that were given, if any were."""


@dataclass(frozen=True)
class ChosenHeadScores:
    """Scores of given ids, c at each position, float32."""

    logprobs: Tensor
    """``[n, c]``."""
    tail: Tensor
    """``[n]`` log of the mass outside them."""
    overlap: Tensor | None
    """``[n]`` share of them that are among the c likeliest."""

    def to_host(self) -> ChosenScores:
        """In main memory."""
        overlap = [] if self.overlap is None else [self.overlap]
        logprobs, tail, *shares = to_host(self.logprobs, self.tail, *overlap)
        return ChosenScores(logprobs, tail, shares[0] if shares else None)


def score_states(
    split: SplitModel,
    states: Tensor,
    targets: Tensor,
    *,
    k: int,
    entropy: bool,
    limit: int | None,
    chosen: Tensor | None = None,
    overlap: bool = False,
) -> HeadScores:
    """Scores of targets ``[n]`` that states ``[n, H]`` predict, in inference mode.

    Args:
        k: alternatives per position; 0 is none.
        limit: only ids below this are alternatives.
        chosen: ``[n, c]`` ids to score as well, none twice at a position, from the same logits.
        overlap: whether it is asked how many of these are among the c likeliest ids below the limit.
    """
    n = len(states)
    # Made first: lasting tensors, allocated among short-lived ones, would keep these from being freed.
    token_logprobs, norms = (states.new_empty(n, dtype=torch.float32) for _ in range(2))
    entropies = torch.empty_like(norms) if entropy else None
    top_ids, top_logprobs = targets.new_empty(n, k), norms.new_empty(n, k)
    given = None
    if chosen is not None:
        shares = torch.empty_like(norms) if overlap else None
        given = ChosenHeadScores(norms.new_empty(chosen.shape), torch.empty_like(norms), shares)
    for rows, logits in _logits(split, states):
        if k:
            torch.topk(logits[:, :limit], k, dim=-1, out=(top_logprobs[rows], top_ids[rows]))
        logprobs = vocabulary_sums.log_softmax_(logits, norms[rows])
        token_logprobs[rows] = logprobs.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
        if entropies is not None:
            entropies[rows] = vocabulary_sums.entropy(logprobs)
        if given is not None and chosen is not None:
            _score_chosen_(logprobs, chosen[rows], given, rows, limit)
        del logits, logprobs  # without a workspace, they would stay until the next are made
    top_logprobs.sub_(norms.unsqueeze(-1)).clamp_(max=0.0)
    return HeadScores(token_logprobs.clamp_(max=0.0), norms, entropies, top_ids, top_logprobs, given)


def _score_chosen_(
    logprobs: Tensor, ids: Tensor, found: ChosenHeadScores, rows: slice, limit: int | None
) -> None:
    """Write the scores of ids ``[c, ·]`` at these rows; the log-probs ``[c, V]`` are written over.

    The mass outside is summed over itself: 1 - Σp has no digits left below 1e-7.
    """
    picked = logprobs.gather(-1, ids)
    found.logprobs[rows] = picked.clamp(max=0.0)
    if found.overlap is not None:
        kth = logprobs[:, :limit].topk(ids.shape[-1], dim=-1).values[:, -1:]
        found.overlap[rows] = (picked >= kth).float().mean(dim=-1)
    logprobs.scatter_(-1, ids, -torch.inf)
    found.tail[rows] = vocabulary_sums.logsumexp(logprobs).clamp_(max=0.0)


def topk_of(
    split: SplitModel, states: Tensor, norms: Tensor, *, k: int, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs ``[n, k]`` of the likeliest tokens, where the log-sum-exps ``[n]`` are known."""
    top_ids = torch.empty(len(states), k, dtype=torch.long, device=states.device)
    top_logprobs = norms.new_empty(len(states), k)
    for rows, logits in _logits(split, states):
        torch.topk(logits[:, :limit], k, dim=-1, out=(top_logprobs[rows], top_ids[rows]))
    return top_ids, top_logprobs.sub_(norms.unsqueeze(-1)).clamp_(max=0.0)


def _logits(split: SplitModel, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits ``[·, V]`` of slices of the positions, to be written over."""
    elements = LOGIT_ELEMENTS_ON_CPU if states.device.type == "cpu" else LOGIT_ELEMENTS
    size = min(len(states), max(1, elements // split.vocabulary(states)))
    space = workspace(size, split.head.weight) if is_plain(split.head) else None
    for low in range(0, len(states), size or 1):
        rows = slice(low, low + size)
        yield rows, split.own_logits(states[rows], space)


def right_pad(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 token, 0 padding) ``[len(rows), width]``."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    mask = (np.arange(width) < np.array([[len(row)] for row in rows])).astype(np.int64)
    return to_device(ids, device), to_device(mask, device)


def batches_of(sequences: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Indices of sequences that go through a model together: shortest first, at most ``budget`` tokens with padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for rows in _token_budget_batches([len(sequences[i]) for i in order], budget):
        yield [order[r] for r in rows]


def _token_budget_batches(lengths: Sequence[int], budget: int) -> list[range]:
    """Consecutive ranges of rows (lengths rising) whose padded size stays within the budget, at least one row each."""
    batches: list[range] = []
    low = 0
    for high in range(1, len(lengths) + 1):
        if high == len(lengths) or (high + 1 - low) * lengths[high] > budget:
            batches.append(range(low, high))
            low = high
    return batches
