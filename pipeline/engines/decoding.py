"""Sampling one batch of rows: they begin together, and leave it when they are done.

This goes in segments. Within one, the batch stays as it is and rows that are done ride along, so that a step needs
little bookkeeping; it ends once a share of the batch is done, and these rows leave.

Legend: R rows in all · B rows of the batch · V vocabulary · n steps of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.engines.base import Generation, Sampling
from tropd.pipeline.engines.sampling import sample_tokens
from tropd.storage.seeds import uniforms

Ints = npt.NDArray[np.int64]
# A segment ends once so much of its batch is done: later wastes steps, sooner moves the cache too often.
DONE_SHARE = 0.125
# Steps of a segment at most.
SEGMENT = 128


class Decoder(Protocol):
    """A model with a cache of the tokens so far of a batch of rows."""

    def start(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Begin with these rows, which will get at most ``room`` more tokens each.

        Returns:
            Float32 logits ``[B, V]`` of the rows' next tokens.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row: ``[B]`` token ids to float32 logits ``[B, V]``."""

    def select(self, keep: Tensor) -> None:
        """Go on with these rows of the batch only."""


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    limits: Sequence[int],
    stop_ids: Tensor,
) -> list[Generation]:
    """Continue each prompt until a stop token or its limit (≥ 1).

    What a row draws depends on its seed and the number of its tokens only.
    """
    shape = (len(prompts), max(limits))
    draws = torch.from_numpy(uniforms(np.asarray(seeds)[:, None], np.arange(shape[1])[None, :]))
    drawn = _Drawn(
        np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32), np.array(limits, dtype=np.int64)
    )
    rows = np.arange(len(prompts))
    logits = decoder.start(prompts, shape[1])
    step = 0
    while True:
        segment = draws[rows, step : step + SEGMENT].T.to(logits.device)
        tokens, logprobs = _segment(decoder, logits, sampling, segment, drawn.ends[rows] - step, stop_ids)
        going = drawn.add(rows, step, tokens, logprobs, stop_ids)
        if not len(going):
            return drawn.generations()
        step += len(tokens)
        last = tokens[-1]
        if len(going) < len(rows):
            keep = few_moved(going)
            index = torch.from_numpy(keep).to(last.device)
            decoder.select(index)
            rows, last = rows[keep], last[index]
        logits = decoder.step(last)


@dataclass(frozen=True)
class _Drawn:
    """What was drawn for each row, and how much of it counts."""

    tokens: Ints
    """``[R, limit]``."""
    logprobs: npt.NDArray[np.float32]
    """``[R, limit]``."""
    ends: Ints
    """``[R]`` the row's limit, or its length once a stop token has ended it."""
    stopped: set[int] = field(default_factory=set)

    def add(self, rows: Ints, step: int, tokens: Tensor, logprobs: Tensor, stop_ids: Tensor) -> Ints:
        """Take a segment's tokens and log-probs ``[n, B]`` of these rows; returns the places of those that go on."""
        is_stop = torch.isin(tokens, stop_ids).T.cpu().numpy()
        end = step + len(tokens)
        self.tokens[rows, step:end] = tokens.T.cpu().numpy()
        self.logprobs[rows, step:end] = logprobs.T.cpu().numpy()
        first = np.where(is_stop.any(axis=1), step + is_stop.argmax(axis=1) + 1, self.ends[rows] + 1)
        stops = first <= self.ends[rows]
        self.ends[rows[stops]] = first[stops]
        self.stopped.update(rows[stops].tolist())
        return np.flatnonzero(self.ends[rows] > end)

    def generations(self) -> list[Generation]:
        return [
            Generation(t[:n], p[:n], "stop" if row in self.stopped else "length")
            for row, (t, p, n) in enumerate(
                zip(self.tokens.tolist(), self.logprobs.tolist(), self.ends.tolist(), strict=True)
            )
        ]


def few_moved(going: Ints) -> Ints:
    """The same places (rising), ordered so that those below their number stay, and the last fill the gaps."""
    size = len(going)
    order = np.arange(size)
    stays = going[going < size]
    order[np.setdiff1d(order, stays)] = going[len(stays) :]
    return order


def _segment(
    decoder: Decoder,
    logits: Tensor,
    sampling: Sampling,
    draws: Tensor,
    left: Ints,
    stop_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs ``[n, B]`` of as many steps as it takes for a share of the rows to be done.

    The last tokens are not yet part of the decoder's cache.
    """
    device = logits.device
    limits = torch.from_numpy(left).to(device)
    going = torch.ones(len(left), dtype=torch.bool, device=device)
    enough = len(left) - max(1, int(DONE_SHARE * len(left)))
    tokens = torch.empty(draws.shape, dtype=torch.long, device=device)
    logprobs = torch.empty(draws.shape, dtype=torch.float32, device=device)
    for n, draw in enumerate(draws):
        if n > 0:
            logits = decoder.step(tokens[n - 1])
        tokens[n], logprobs[n] = sample_tokens(
            logits, draw, temperature=sampling.temperature, top_p=sampling.top_p
        )
        going &= (tokens[n].unsqueeze(-1) != stop_ids).all(dim=-1)
        going &= limits > n + 1
        if int(going.sum()) <= enough:
            break
    return tokens[: n + 1], logprobs[: n + 1]
