"""Log-probs of chosen tokens from hidden states, in chunks, without ever holding ``[tokens, V]`` logits.

Legend: n supervised positions · H hidden size · V vocabulary · A alternatives of all positions, concatenated.
Each chunk's logits are recomputed in the backward pass (activation checkpointing), so that the peak is
O(chunk·V + n·H + A). Log-softmax and its sums are in float32, whatever the model's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tropd.pipeline.models import SplitModel

# Logits of one chunk: 2^25 float32 numbers, 128 MiB.
CHUNK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Lookups:
    """Ids whose log-probs are wanted besides the target's: ragged, in the order of the positions."""

    counts: Tensor
    """``[n]`` int64, alternatives per position (0 for most)."""
    ids: Tensor
    """``[A]`` int64."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What an objective needs of the student."""

    targets: Tensor
    """``[n]`` log-prob of each target, float32, with gradient."""
    lookups: Tensor
    """``[A]`` log-probs of the looked-up ids, float32, with gradient."""
    entropy: Tensor
    """``[n]`` entropy in nats, detached."""
    overlap: Tensor
    """``[n]`` share of a position's looked-up ids that are among as many likeliest ids of the student;
    NaN where nothing is looked up. Detached."""


def token_logprobs(
    split: SplitModel, states: Tensor, targets: Tensor, lookups: Lookups | None = None
) -> TokenLogprobs:
    """Log-probs at n positions.

    Args:
        split: the model, for its output layer.
        states: ``[n, H]`` hidden states that predict the targets.
        targets: ``[n]`` token ids.
        lookups: more ids per position.
    """
    if lookups is None:
        lookups = Lookups(targets.new_zeros(len(targets)), targets.new_zeros(0))
    size = max(1, CHUNK_ELEMENTS // vocabulary(split, states))
    parts = []
    first = 0
    for low in range(0, len(targets), size):
        high = min(low + size, len(targets))
        counts = lookups.counts[low:high]
        last = first + int(counts.sum())
        arguments = (split, states[low:high], targets[low:high], counts, lookups.ids[first:last])
        if torch.is_grad_enabled() and size < len(targets):
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
        first = last
    if not parts:
        empty = states.sum(dim=-1).float()
        return TokenLogprobs(empty, empty, empty.detach(), empty.detach())
    return TokenLogprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def vocabulary(split: SplitModel, states: Tensor) -> int:
    """Size of the output layer (of the states themselves where the head is not separable)."""
    weight = getattr(split.head, "weight", None)
    return int(states.shape[-1] if weight is None else weight.shape[0])


def _chunk(
    split: SplitModel, states: Tensor, targets: Tensor, counts: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(split.logits(states), dim=-1)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    rows = torch.repeat_interleave(torch.arange(len(targets), device=targets.device), counts)
    found = logprobs[rows, ids]
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
        overlap = _overlap(logprobs, found, rows, counts)
    return chosen, found, entropy, overlap


def _overlap(logprobs: Tensor, found: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """An id is among the c likeliest iff its log-prob reaches the c-th largest."""
    overlap = torch.full_like(logprobs[:, 0], torch.nan)
    asked = counts > 0
    if not bool(asked.any()):
        return overlap
    largest = logprobs[asked].topk(int(counts.max()), dim=-1).values
    threshold = torch.full_like(overlap, torch.inf)
    threshold[asked] = largest.gather(-1, (counts[asked] - 1).unsqueeze(-1)).squeeze(-1)
    hits = torch.zeros_like(overlap).index_add_(0, rows, (found >= threshold[rows]).float())
    return torch.where(asked, hits / counts.clamp(min=1), overlap)
