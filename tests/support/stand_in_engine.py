"""An engine for a process of its own that has no model: its answers tell what it was given. Weights may hang or fail."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tropd.pipeline.models.engines.base import (
    Finished,
    Generation,
    Sampling,
    SequenceScores,
    TopkWhere,
    everywhere,
)
from tropd.storage.errors import ConfigError, TropdError

HANGS, REFUSES, FAILS, ENDS, TELLS_ENVIRONMENT, WAITS = 90, 91, 92, 93, 94, 95
"""First weight with which an update hangs; first tokens of a prompt with which an answer is an error, ends it all, …"""


class StandIn:
    """A continuation of a prompt has its length and the first weight; its score is the sum of all weights."""

    max_length, vocab_size = 77, 100

    def __init__(self, sleeps: bool) -> None:
        self.sleeps = sleeps
        self._weights: dict[str, Tensor] = {}
        self._naps = 0

    def rest(self) -> None:
        self._naps += 1
        self._weights = {}

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = {name: value.clone() for name, value in weights}
        if self._first() == HANGS:
            print("waiting for nothing", flush=True)
            time.sleep(600)

    def take_update(self, update: Mapping[str, Any]) -> None:
        raise AssertionError("there is no GPU here")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Generation]:
        first = prompts[0][0] if prompts else 0
        if first == REFUSES:
            raise ConfigError("this is not possible", hint="ask for something else")
        if first == FAILS:
            raise TropdError("this went wrong", hint="try again")
        if first == ENDS:
            os._exit(7)
        if first == TELLS_ENVIRONMENT:
            return [Generation([int("RANK" in os.environ)], [-1.0], "length")]
        assert self._weights, "asleep"
        written = [
            Generation([len(p), self._first(), self._naps], [-0.1, -seed / 7, -limit], "stop", drawn)
            for p, seed, limit, drawn in zip(
                prompts,
                seeds,
                max_tokens,
                [None if sampling.plain else [-1.0, -2.0, -3.0]] * len(prompts),
                strict=True,
            )
        ]
        if finished is not None:
            for number in reversed(range(len(written))):
                finished(number, written[number])
            if first == WAITS:
                time.sleep(600)
        return written

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        k: int = 0,
        entropy: bool = False,
        topk_where: TopkWhere = everywhere,
        vocab_limit: int | None = None,
    ) -> list[SequenceScores]:
        assert self._weights, "asleep"
        total = sum(float(value.float().sum()) for value in self._weights.values())
        found = []
        for sequence, start in zip(sequences, starts, strict=True):
            n = len(sequence) - start
            # Its likeliest ids are those after the token itself.
            ids = np.array(sequence[start:], np.int32)[:, None] + np.arange(k, dtype=np.int32)
            at = np.arange(n if k else 0), ids[: n if k else 0], np.zeros((n if k else 0, k), np.float32)
            found.append(SequenceScores(np.full(n, total, np.float32), None, *at))
        return found

    def _first(self) -> int:
        return int(next(iter(self._weights.values())).flatten()[0])


def build(sleeps: bool = True) -> StandIn:
    return StandIn(sleeps)


def fail(error: Exception) -> StandIn:
    raise error
