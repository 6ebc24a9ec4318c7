"""Log-probs of chosen tokens from hidden states, in chunks, without ever holding ``[tokens, V]`` logits.

Legend: n supervised positions · H hidden size · V vocabulary · A alternatives of all positions, concatenated ·
c positions of a chunk.
Plain heads (a linear layer, with or without bias, tied or not, with or without a soft cap) go through
``ChunkedLogprobs``: chunks of logits are made, used and dropped, once forward and once more backward, where the
gradient of the loss by the logits, g_x·(1[x] - softmax) summed over the ids x of a position, is written over them.
The log of the mass outside a position's ids is summed over that mass, not taken from 1 - Σp: in float32 the latter has no
digits left below 1e-7. Its gradient by the logits, p_v/mass - p_v outside and -p_v inside, is of order 1 at any mass.
Peak memory is O(c·V + n·H + A + V·H), the last being the head's own gradient. Other heads are checkpointed chunk by
chunk. Logits, log-softmax and sums are float32, whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tropd.pipeline.models.output.output_layer import (
    SplitModel,
    is_plain,
    mask_rows_,
    operand,
    plain_logits,
    product_dtype,
    workspace,
)
from tropd.pipeline.models.output.vocabulary_sums import entropy, log_softmax_, logsumexp, row_blocks
from tropd.pipeline.models.runtime import gpu_bytes, to_device

# Logits of one chunk: 2^25 float32 numbers, 128 MiB.
CHUNK_ELEMENTS = 1 << 25
# Most on a GPU: 1 GiB, from 64 GiB of memory on. Each chunk also reads and writes the head's whole gradient.
CHUNK_ELEMENTS_ON_GPU = 1 << 28
BYTES_PER_ELEMENT = 256


def chunk_elements(gpu_bytes: float | None) -> int:
    """Logits of one chunk, on a GPU with so much memory; None is a CPU."""
    if gpu_bytes is None:
        return CHUNK_ELEMENTS
    return max(CHUNK_ELEMENTS, min(CHUNK_ELEMENTS_ON_GPU, int(gpu_bytes / BYTES_PER_ELEMENT)))


@dataclass(frozen=True)
class Lookups:
    """Ids whose log-probs are wanted besides the target's: ragged, in the order of the positions."""

    counts: Tensor
    """``[n]`` int64, alternatives per position (0 for most). In main memory: sizes follow from them, for which the host
    would have to wait for a GPU."""
    ids: Tensor
    """``[A]`` int64, each at most once per position."""
    tail: bool = False
    """Whether the mass outside them is wanted, which costs a pass over the logits."""

    @staticmethod
    def none(targets: Tensor) -> Lookups:
        """None for any of the targets ``[n]``."""
        return Lookups(torch.zeros(len(targets), dtype=torch.int64), targets.new_zeros(0))


@dataclass(frozen=True)
class TokenLogprobs:
    """The student's values that an objective needs."""

    targets: Tensor
    """``[n]`` log-prob of each target, float32, with gradient."""
    lookups: Tensor
    """``[A]`` log-probs of the looked-up ids, float32, with gradient."""
    entropy: Tensor
    """``[n]`` entropy in nats, detached."""
    overlap: Tensor
    """``[n]`` share of a position's looked-up ids that are among as many likeliest ids of the student;
    NaN where nothing is looked up. Detached."""
    tail: Tensor
    """``[n]`` log of the mass outside a position's looked-up ids, float32, with gradient; -inf where no id is outside, 0
    where nothing is looked up, or the tail is not asked for."""


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
        lookups = Lookups.none(targets)
    elements = chunk_elements(gpu_bytes(states.device) if states.device.type == "cuda" else None)
    size = max(1, elements // split.vocabulary(states))
    if not len(targets):
        empty = states.sum(dim=-1).float()
        return TokenLogprobs(empty, empty, empty.detach(), empty.detach(), empty)
    places = _places(lookups.counts, min(size, len(targets)), targets.device)
    if size >= len(targets):  # nothing to save: logits of one chunk may as well be kept
        return TokenLogprobs(*_chunk(split, states, targets, places[0], lookups.ids, lookups.tail))
    if is_plain(split.head):
        head = split.head
        dtype = product_dtype(states)
        return TokenLogprobs(
            *ChunkedLogprobs.apply(
                states,
                head.weight,
                head.bias,
                targets,
                places,
                lookups.ids,
                lookups.tail,
                split.softcap,
                dtype,
                size,
                split.limit,
            )
        )
    parts = [
        checkpoint(
            _chunk,
            split,
            states[place.rows],
            targets[place.rows],
            place,
            lookups.ids[place.entries],
            lookups.tail,
            use_reentrant=False,
        )
        for place in places
    ]
    return TokenLogprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Places:
    """Some positions and their lookups, with all sizes known to the host. m of the positions have any."""

    rows: slice
    """Of the n positions."""
    entries: slice
    """Of the A ids."""
    owners: Tensor
    """``[a]`` which of these positions each id belongs to."""
    has_any: Tensor
    """``[c]`` True where a position has ids."""
    asked: Tensor
    """``[m]`` positions that have."""
    counts: Tensor
    """``[m]`` how many they have."""
    most: int
    """The largest of these; 0 if there are none."""


def _places(counts: Tensor, size: int, device: torch.device) -> list[_Places]:
    """Of all positions, ``size`` at a time; ``counts`` ``[n]`` are in main memory, and go to the device once."""
    numbers = counts.numpy()
    places, asked = np.arange(len(numbers)) % size, np.flatnonzero(numbers)
    parts = [np.repeat(places, numbers), (numbers > 0).astype(np.int64), places[asked], numbers[asked]]
    sent = to_device(np.concatenate(parts), device).split([len(part) for part in parts])
    owners, has_any, asked_here, asked_counts = sent[0], sent[1].bool(), sent[2], sent[3]
    lows = np.arange(0, len(numbers), size)
    bounds = np.append(lows, len(numbers))
    ends = np.concatenate([[0], np.cumsum(numbers)])[bounds].tolist()
    firsts = np.searchsorted(asked, bounds).tolist()
    most = np.maximum.reduceat(numbers, lows).tolist()
    found = []
    for i, low in enumerate(lows.tolist()):
        rows, entries = slice(low, min(low + size, len(numbers))), slice(ends[i], ends[i + 1])
        chosen = slice(firsts[i], firsts[i + 1])
        found.append(
            _Places(
                rows,
                entries,
                owners[entries],
                has_any[rows],
                asked_here[chosen],
                asked_counts[chosen],
                most[i],
            )
        )
    return found


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probs, entropy and overlap of a linear head, with the logits recomputed in the backward pass.

    Inputs: states ``[n, H]``, weight ``[V, H]``, bias ``[V]`` or None, targets ``[n]``, the chunks' places, ids ``[A]``,
    whether tails are wanted, the soft cap or None, the dtype of matrix products, positions per chunk, the ``limit`` of
    ``SplitModel``. Outputs: those of ``TokenLogprobs``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        places: Sequence[_Places],
        ids: Tensor,
        wants_tail: bool,
        softcap: float | None,
        dtype: torch.dtype,
        size: int,
        limit: int | None,
    ) -> tuple[Tensor, ...]:
        # Made first: lasting tensors, allocated among short-lived ones, would keep these from being freed.
        norms, chosen, entropies, overlap = (
            states.new_empty(len(targets), dtype=torch.float32) for _ in range(4)
        )
        found = states.new_empty(len(ids), dtype=torch.float32)
        tails = torch.zeros_like(norms)
        kept, space = operand(weight, dtype), workspace(size, weight)
        for place in places:
            rows, entries = place.rows, place.entries
            logits = plain_logits(states[rows], kept, bias, dtype, softcap=softcap, space=space)
            mask_rows_(logits, limit)
            logprobs = log_softmax_(logits, norms[rows])
            picked = _pick(logprobs, targets[rows], place, ids[entries])
            chosen[rows], found[entries], entropies[rows], overlap[rows] = picked
            if wants_tail:
                # The logits are ours, and have been read.
                logprobs[place.owners, ids[entries]] = -torch.inf
                tails[rows] = torch.where(place.has_any, logsumexp(logprobs), 0.0)
            del logits, logprobs  # without a workspace, they would stay until the next are made
        ctx.save_for_backward(states, weight, bias, targets, ids, norms, tails)
        ctx.places = places
        ctx.wants_tail, ctx.softcap, ctx.dtype, ctx.size = wants_tail, softcap, dtype, size
        ctx.limit = limit
        ctx.mark_non_differentiable(entropies, overlap)
        return chosen, found, entropies, overlap, tails

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_chosen: Tensor,
        grad_found: Tensor,
        _entropy: Tensor,
        _overlap: Tensor,
        grad_tail: Tensor,
    ) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, ids, norms, tails = ctx.saved_tensors
        softcap, dtype = ctx.softcap, ctx.dtype
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        low_weight, kept, space = weight.to(dtype), operand(weight, dtype), workspace(ctx.size, weight)
        for place in ctx.places:
            rows, entries = place.rows, place.entries
            logits = plain_logits(states[rows], kept, bias, dtype, softcap=softcap, space=space)
            slope = None if softcap is None else 1.0 - (logits / softcap) ** 2
            mask_rows_(logits, ctx.limit)
            by_target, by_lookup = grad_chosen[rows].unsqueeze(-1), grad_found[entries]
            position = place.owners
            total = by_target.squeeze(-1).index_add(0, position, by_lookup).unsqueeze(-1)
            logprobs = logits.sub_(norms[rows].unsqueeze(-1))
            if ctx.wants_tail:
                by_tail = torch.where(place.has_any, grad_tail[rows], 0.0)
                grad = _tail_gradient_(logprobs, tails[rows], total, by_tail, position, ids[entries])
            else:
                grad = logprobs.exp_().mul_(-total)
            grad.scatter_add_(-1, targets[rows].unsqueeze(-1), by_target)
            grad.index_put_((position, ids[entries]), by_lookup, accumulate=True)
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            low_grad = grad.to(dtype)
            if grad_states is not None:
                grad_states[rows] = (low_grad @ low_weight).to(states.dtype)
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(low_grad.T, states[rows].to(dtype))
            elif grad_weight is not None:
                grad_weight += low_grad.T @ states[rows].to(dtype)
            del logits, logprobs, grad, low_grad
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 8,
        )


def _tail_gradient_(
    logprobs: Tensor, tails: Tensor, total: Tensor, by_tail: Tensor, position: Tensor, ids: Tensor
) -> Tensor:
    """Gradient by the logits, of tails and of the norms of all chosen tokens, written over log-probs ``[c, V]``."""
    inside = logprobs[position, ids].exp()
    logprobs[position, ids] = -torch.inf
    total = total + by_tail.unsqueeze(-1)
    finite = torch.where(tails.isneginf(), 0.0, tails)  # then no id is outside, and -inf stays -inf
    for rows in row_blocks(logprobs):
        share = (logprobs[rows] - finite[rows].unsqueeze(-1)).exp_().mul_(by_tail[rows].unsqueeze(-1))
        logprobs[rows].exp_().mul_(-total[rows]).add_(share)
    logprobs[position, ids] = -total.squeeze(-1)[position] * inside
    return logprobs


def _chunk(
    split: SplitModel, states: Tensor, targets: Tensor, place: _Places, ids: Tensor, wants_tail: bool
) -> tuple[Tensor, ...]:
    logprobs = torch.log_softmax(split.logits(states), dim=-1)
    picked = _pick(logprobs, targets, place, ids)
    return *picked, _tail(logprobs, place, ids) if wants_tail else torch.zeros_like(picked[2])


def _tail(logprobs: Tensor, place: _Places, ids: Tensor) -> Tensor:
    """``[c]`` log of the mass of ``[c, V]`` log-probs outside the ids, with gradient."""
    least = torch.finfo(logprobs.dtype).min  # -inf would be NaN in the gradient where no id is outside
    without = logprobs.index_put((place.owners, ids), torch.full_like(ids, least, dtype=logprobs.dtype))
    tail = without.logsumexp(dim=-1)
    tail = torch.where(tail < least / 2, -torch.inf, tail)
    return torch.where(place.has_any, tail, 0.0)


def _pick(
    logprobs: Tensor, targets: Tensor, place: _Places, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of targets and ids, entropy, and overlap, from ``[c, V]`` log-probs."""
    chosen = logprobs[torch.arange(len(targets), device=targets.device), targets]
    found = logprobs[place.owners, ids]
    with torch.no_grad():
        overlap = _overlap(logprobs, found, place)
    return chosen, found, entropy(logprobs), overlap


def _overlap(logprobs: Tensor, found: Tensor, place: _Places) -> Tensor:
    """An id is among the c likeliest iff its log-prob reaches the c-th largest."""
    overlap = torch.full_like(logprobs[:, 0], torch.nan)
    if not place.most:
        return overlap
    largest = logprobs[place.asked].topk(place.most, dim=-1).values
    threshold = torch.full_like(overlap, torch.inf)
    threshold[place.asked] = largest.gather(-1, (place.counts - 1).unsqueeze(-1)).squeeze(-1)
    hits = torch.zeros_like(overlap).index_add_(0, place.owners, (found >= threshold[place.owners]).float())
    overlap[place.asked] = hits[place.asked] / place.counts
    return overlap
