"""Sums over the vocabulary of logits ``[n, V]``, some rows at a time.

PyTorch makes copies of all it is given to take such sums: three times the logits for an entropy. On a CPU, a few rows at
once are faster, too: the copies stay in its caches, and their memory is used again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Logits that are summed at once on a CPU: 4 MiB."""


def log_softmax_(logits: Tensor, norms: Tensor) -> Tensor:
    """Turns float32 logits ``[n, V]`` into log-probs, where they lie; writes their log-sum-exps to ``norms`` ``[n]``."""
    size = _rows(logits)
    for block, into in zip(logits.split(size), norms.split(size), strict=True):
        torch.logsumexp(block, dim=-1, out=into)
        block -= into.unsqueeze(-1)
    return logits


def logsumexp(logits: Tensor) -> Tensor:
    """``[n]`` log-sum-exps of ``[n, V]`` logits, without gradient; -inf where all are."""
    result = logits.new_empty(len(logits))
    for rows in row_blocks(logits):
        torch.logsumexp(logits[rows], dim=-1, out=result[rows])
    return result


def entropy(logprobs: Tensor) -> Tensor:
    """``[n]`` nats of ``[n, V]`` log-probs, without gradient; an id that is never drawn (-inf) adds nothing."""
    logprobs = logprobs.detach()
    result = logprobs.new_empty(len(logprobs))
    size = _rows(logprobs)
    for block, into in zip(logprobs.split(size), result.split(size), strict=True):
        finite = block.clamp(min=torch.finfo(block.dtype).min)
        torch.sum(finite.mul_(block.exp()), dim=-1, out=into)
    return result.neg_()


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of ``[n, V]`` logits that are summed at once."""
    size = _rows(logits)
    for low in range(0, len(logits), size):
        yield slice(low, low + size)


def _rows(logits: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // logits.shape[-1] if logits.device.type == "cpu" else len(logits))
