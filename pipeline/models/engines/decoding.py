"""Sampling one batch of rows: they begin together, and leave it when they are done.

This goes in segments. Within one, the batch stays as it is and rows that are done ride along, so that a step needs
little bookkeeping; it ends once a share of the batch is done, and these rows leave.

Legend: R rows in all · B rows of the batch · n steps of a segment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.models.engines.base import Finished, Generation
from tropd.pipeline.models.runtime import to_device, to_host
from tropd.storage.arrays import Floats32, Ints
from tropd.storage.seeds import uniforms

# A segment ends once so much of its batch is done: later wastes steps, sooner moves the cache too often.
DONE_SHARE = 0.25
# Steps of a segment at most.
SEGMENT = 128
# Batches on a GPU are larger by up to this factor where it saves one.
SLACK = 1.25
# Steps between looks at the tokens on a GPU, for which the host waits until it has drawn them: a row that is done before
# rides along, and its further tokens are dropped.
STEPS_ON_GPU = 16

ChosenTokens = tuple[Tensor, Tensor, Tensor]
"""Tokens, their log-probs, and those under the distribution drawn from, ``[B]`` each; see ``sample_tokens``."""


class Decoder(Protocol):
    """A model with a cache of the tokens so far of a batch of rows, which chooses their next ones.

    ``draws``, ``[B]`` float64 in [0, 1), are the chance in it (see ``sample_tokens``).
    """

    def start(self, prompts: Sequence[Sequence[int]], room: int, draws: Tensor) -> ChosenTokens:
        """Begin with these rows, which will get at most ``room`` tokens each, and choose the first."""

    def step(self, draws: Tensor) -> ChosenTokens:
        """Append to each row its last chosen token, and choose the next."""

    def select(self, keep: Tensor) -> None:
        """Continue with these rows of the batch only."""


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    device: torch.device,
    finished: Finished | None = None,
) -> list[Generation]:
    """Continue each prompt until a stop token or its limit (≥ 1).

    The tokens that a row draws depend on its seed and the number of its tokens only.

    Args:
        finished: told of every row at the end of the segment in which it is done.
    """
    shape = (len(prompts), max(limits))
    draws = uniforms(np.asarray(seeds)[:, None], np.arange(shape[1])[None, :])
    drawn = _Drawn(
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=np.float32),
        np.zeros(shape, dtype=np.float32),
        np.array(limits, dtype=np.int64),
    )
    rows = np.arange(len(prompts))
    untold = set(range(len(prompts)))
    steps: Iterator[Callable[[Tensor], ChosenTokens]] = itertools.chain(
        [functools.partial(decoder.start, prompts, shape[1])], itertools.repeat(decoder.step)
    )
    step = 0
    while True:
        choices = zip(to_device(draws[rows, step : step + SEGMENT].T, device), steps, strict=False)
        segment_choice = _segment(
            (choose(draw) for draw, choose in choices),
            drawn.ends[rows] - step,
            stop_ids,
            1 if device.type == "cpu" else STEPS_ON_GPU,
        )
        going = drawn.add(rows, step, segment_choice, stop_ids)
        if finished is not None:
            for row in sorted(untold.difference(rows[going].tolist())):
                finished(row, drawn.generation(row))
                untold.remove(row)
        if not len(going):
            return drawn.generations()
        step += len(segment_choice[0])
        if len(going) == 1 < len(rows):  # alone it would be no faster, and run uncompiled
            going = np.union1d(going, 0 if going[0] else 1)
        if len(going) < len(rows):
            keep = few_moved(going)
            decoder.select(to_device(keep, device))
            rows = rows[keep]


@dataclass(frozen=True)
class _Drawn:
    """The tokens drawn for each row, and how many of them count."""

    tokens: Ints
    """``[R, limit]``."""
    logprobs: Floats32
    """``[R, limit]``."""
    drawn_logprobs: Floats32
    """``[R, limit]``."""
    ends: Ints
    """``[R]`` the row's limit, or its length once a stop token has ended it."""
    stopped: set[int] = field(default_factory=set)

    def add(
        self, rows: Ints, step: int, segment: tuple[Ints, Floats32, Floats32], stop_ids: Sequence[int]
    ) -> Ints:
        """Take a segment's tokens and log-probs ``[n, B]`` of these rows; returns the places of those that continue."""
        tokens, logprobs, drawn_logprobs = segment
        is_stop = np.isin(tokens, stop_ids).T
        end = step + len(tokens)
        self.tokens[rows, step:end] = tokens.T
        self.logprobs[rows, step:end] = logprobs.T
        self.drawn_logprobs[rows, step:end] = drawn_logprobs.T
        first = np.where(is_stop.any(axis=1), step + is_stop.argmax(axis=1) + 1, self.ends[rows] + 1)
        stops = first <= self.ends[rows]
        self.ends[rows[stops]] = first[stops]
        self.stopped.update(rows[stops].tolist())
        return np.flatnonzero(self.ends[rows] > end)

    def generations(self) -> list[Generation]:
        return [self.generation(row) for row in range(len(self.ends))]

    def generation(self, row: int) -> Generation:
        tokens, logprobs, drawn = (
            values[row, : self.ends[row]].tolist()
            for values in (self.tokens, self.logprobs, self.drawn_logprobs)
        )
        return Generation(tokens, logprobs, "stop" if row in self.stopped else "length", drawn)


def few_moved(going: Ints) -> Ints:
    """The same places (rising), ordered so that those below their number stay, and the last fill the gaps."""
    size = len(going)
    order = np.arange(size)
    stays = going[going < size]
    order[np.setdiff1d(order, stays)] = going[len(stays) :]
    return order


def _segment(
    choices: Iterable[ChosenTokens], left: Ints, stop_ids: Sequence[int], every: int
) -> tuple[Ints, Floats32, Floats32]:
    """Tokens and log-probs ``[n, B]`` of as many steps as it takes for a share of the rows to be done.

    Args:
        choices: of one step after the other, each made when it is asked for.
        left: ``[B]`` tokens until a row's limit.
        every: steps until their tokens are looked at.
    """
    going = left > 0
    count = np.count_nonzero(going)
    enough = count - max(1, int(DONE_SHARE * count))
    found: list[list[npt.NDArray[Any]]] = []
    steps = 0
    remaining = iter(choices)
    while np.count_nonzero(going) > enough and (some := list(itertools.islice(remaining, every))):
        steps += len(some)
        found.append(_on_host(some))
        for stop in stop_ids:
            going &= (found[-1][0] != stop).all(axis=0)
        going &= left > steps
    tokens, logprobs, drawn = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return tokens, logprobs, drawn


def _on_host(steps: Sequence[ChosenTokens]) -> list[npt.NDArray[Any]]:
    """Tokens and log-probs ``[n, B]`` of n steps, which are few numbers."""
    # A small model's step is short beside a few copies.
    if len(steps) == 1 and steps[0][0].device.type == "cpu":
        return [part.numpy()[None] for part in steps[0]]
    return to_host(*(torch.stack(parts) for parts in zip(*steps, strict=True)))


def batch_sizes(rows: int, most: int, device: torch.device) -> list[int]:
    """Sizes of the batches in which rows are decoded, at most ``most`` together.

    A step of a GPU costs about the same for a few rows as for many: there a last batch of a few rows would double the
    time, so batches are of one size, and all are up to a quarter larger where this saves one. A step of a CPU costs
    what its rows cost.
    """
    if device.type == "cpu":
        return [min(most, rows - low) for low in range(0, rows, most)]
    number = -(-rows // max(1, int(SLACK * most))) if rows else 0
    return [len(part) for part in np.array_split(np.arange(rows), number)] if number else []
