"""The interface of an inference engine: sample from a model, and score given tokens with it.

Token ids in, token ids and log-probs out; engines know nothing of prompts, objectives or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tropd.storage.formats.trajectories import FinishReason


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def plain(self) -> bool:
        """Tokens are drawn from the model's own distribution: the full softmax at temperature 1."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    ``logprobs`` are natural log-probs of ``tokens`` under the softmax over all tokens at temperature 1, whatever the
    sampling temperature. ``tokens`` ends with an end-of-sequence token iff ``finish_reason`` is ``stop``.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    drawn_logprobs: list[float] | None = None
    """Natural log-probs of ``tokens`` under the distribution that they were drawn from: at the sampling temperature,
    renormalized over the nucleus (0 where the choice was greedy). None: these are ``logprobs``, as the sampling was
    plain; or the engine does not know them."""

    @property
    def written(self) -> list[int]:
        """The tokens without the one that ends the response, which may be like any other to the tokenizer."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


Finished = Callable[[int, Generation], None]
"""Told of a prompt's number and its continuation as soon as that is complete. It returns at once and raises nothing."""


def of_batch(finished: Finished | None, numbers: Sequence[int]) -> Finished | None:
    """For a batch of prompts with these numbers: told of places in the batch."""
    return None if finished is None else lambda place, generation: finished(numbers[place], generation)


IdTable = npt.NDArray[np.int32]
"""``[n, c]`` token ids, c for each of a sequence's n scored tokens."""


@dataclass(frozen=True)
class ChosenScores:
    """Scores of ids that were given for each of a sequence's n scored tokens, c for each; float32."""

    logprobs: npt.NDArray[np.float32]
    """``[n, c]`` their log-probs, in the order of the ids."""
    tail: npt.NDArray[np.float32]
    """``[n]`` log of the mass outside them, summed over that mass; -inf if none."""
    overlap: npt.NDArray[np.float32] | None
    """``[n]`` share of them that are among the c likeliest, if asked for."""

    def part(self, low: int, high: int) -> ChosenScores:
        """The scores of some consecutive tokens."""
        overlap = None if self.overlap is None else self.overlap[low:high]
        return ChosenScores(self.logprobs[low:high], self.tail[low:high], overlap)


@dataclass(frozen=True)
class SequenceScores:
    """Scores of one sequence's n scored tokens: those from its start index to its end.

    All log-probs are natural, float32, from the softmax over all tokens at temperature 1.
    """

    token_logprobs: npt.NDArray[np.float32]
    """``[n]`` log-prob of each scored token."""
    entropy: npt.NDArray[np.float32] | None
    """``[n]`` full-vocabulary entropy in nats at each scored position, if asked for."""
    topk_positions: npt.NDArray[np.int64]
    """``[m]`` which of the n tokens have alternatives, rising."""
    topk_ids: npt.NDArray[np.int32]
    """``[m, k]`` token ids, likeliest first."""
    topk_logprobs: npt.NDArray[np.float32]
    """``[m, k]`` their log-probs, descending."""
    chosen: ChosenScores | None = None
    """Of the ids that were given, if any were."""


TopkWhere = Callable[[int, npt.NDArray[np.float32], npt.NDArray[np.float32] | None], npt.NDArray[np.bool_]]
"""Given a sequence's index, its token log-probs ``[n]`` and its entropy ``[n]``: where alternatives are wanted."""


def everywhere(
    index: int, token_logprobs: npt.NDArray[np.float32], entropy: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.bool_]:
    """Alternatives for every scored token."""
    return np.ones(len(token_logprobs), dtype=np.bool_)


Choose = Callable[[Sequence[Sequence[int]], Sequence[int], int, int], list[IdTable]]
"""Given sequences, starts, k and a limit of ids: the k likeliest ids ``[n, k]`` below it at every scored token."""


class Sampler(Protocol):
    """A model that can sample."""

    @property
    def max_length(self) -> int:
        """Most tokens that a sequence may have, prompt included."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Generation]:
        """Continue each prompt by at most its ``max_tokens`` (≥ 1) tokens.

        A continuation depends on its own prompt and seed, not on the other rows. It holds tokens only: no ids that the
        tokenizer does not have.

        Args:
            finished: told of continuations while others are still written, in any order, each at most once. An engine may
                leave out any of them.
        """


def choose_with(engine: Engine) -> Choose:
    """The likeliest ids, from an engine's scores."""

    def choose(
        sequences: Sequence[Sequence[int]], starts: Sequence[int], k: int, limit: int
    ) -> list[IdTable]:
        return [found.topk_ids for found in engine.score(sequences, starts, k=k, vocab_limit=limit)]

    return choose


class Engine(Sampler, Protocol):
    """A model that can sample and score."""

    @property
    def vocab_size(self) -> int:
        """Ids below this are tokens: those that the tokenizer has, of the rows of the output layer."""

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        k: int = 0,
        entropy: bool = False,
        topk_where: TopkWhere = everywhere,
        vocab_limit: int | None = None,
        chosen: Sequence[IdTable] | None = None,
        overlap: bool = False,
    ) -> list[SequenceScores]:
        """Log-probs of ``sequence[start:]`` for each sequence (1 ≤ start ≤ length).

        With k > 0, also the k likeliest tokens (at most the vocabulary) at the positions that ``topk_where``
        chooses from the log-probs of the scored tokens; ``vocab_limit`` restricts them to ids below it.
        With ``chosen``, ids ``[n, c]`` per sequence (no id twice at a token), also ``ChosenScores``.

        Raises:
            ValueError: an id outside the vocabulary, a start out of range, or a sequence above ``max_length``.
            ConfigError: the engine does not give what is asked for.
        """
