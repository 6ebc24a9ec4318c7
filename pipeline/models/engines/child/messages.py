"""What the trainer asks an engine beside it, and what that answers. Rows of tokens travel as arrays.

Messages are pickled, over a pipe that no other process has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tropd.pipeline.models.engines.base import Engine, Generation, IdTable, Sampling
from tropd.pipeline.models.engines.child.weights import WeightLayout
from tropd.storage.formats.trajectories import FinishReason


class StudentEngine(Engine, Protocol):
    """An engine whose weights are set from outside, and which sleeps while they change."""

    @property
    def sleeps(self) -> bool:
        """Whether ``rest`` frees memory."""

    def rest(self) -> None:
        """Free memory until weights are set."""

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up with these weights."""

    def take_update(self, update: Mapping[str, Any]) -> None:
        """Wake up with the weights that handles of a GPU's memory lead to (see ``weights.handles``)."""


Build = Callable[[], StudentEngine]


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers, one after another."""

    flat: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Collection[Sequence[float] | npt.NDArray[Any]], dtype: npt.DTypeLike) -> Ragged:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        parts = [np.asarray(row, dtype=dtype) for row in rows]
        return cls(np.concatenate([np.zeros(0, dtype=dtype), *parts]), lengths)

    def rows(self) -> list[npt.NDArray[Any]]:
        return np.split(self.flat, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


@dataclass(frozen=True)
class Start:
    """Build the engine. Its weights come through ``memory``, of this layout, unless it is a GPU's."""

    build: Build
    layout: WeightLayout
    memory: int | None


@dataclass(frozen=True)
class Started:
    """It is ready, and rests."""

    max_length: int
    sleeps: bool


@dataclass(frozen=True)
class SetWeights:
    """Wake up with the weights in shared memory, or with those of these handles."""

    handles: Mapping[str, Any] | None


@dataclass(frozen=True)
class Rest:
    """See ``StudentEngine.rest``."""


@dataclass(frozen=True)
class Generate:
    """See ``Sampler.generate``. With ``tells``, continuations are ``OneWritten`` of before all are ``Written``."""

    prompts: Ragged
    sampling: Sampling
    seeds: tuple[int, ...]
    max_tokens: tuple[int, ...]
    tells: bool


@dataclass(frozen=True)
class Score:
    """See ``Engine.score``, for the tokens' own log-probs."""

    sequences: Ragged
    starts: tuple[int, ...]


@dataclass(frozen=True)
class FindLikeliest:
    """See ``Choose``."""

    sequences: Ragged
    starts: tuple[int, ...]
    k: int
    limit: int


@dataclass(frozen=True)
class Done:
    """It was done."""


@dataclass(frozen=True)
class Written:
    """Continuations, in order."""

    tokens: Ragged
    logprobs: npt.NDArray[np.float64]
    drawn: npt.NDArray[np.float64] | None
    """Where the engine knows them of all continuations (see ``Generation``)."""
    reasons: tuple[FinishReason, ...]

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> Written:
        drawn = [g.drawn_logprobs for g in generations if g.drawn_logprobs is not None]
        return cls(
            Ragged.of([g.tokens for g in generations], np.int32),
            Ragged.of([g.logprobs for g in generations], np.float64).flat,
            Ragged.of(drawn, np.float64).flat if drawn and len(drawn) == len(generations) else None,
            tuple(g.finish_reason for g in generations),
        )

    def generations(self) -> list[Generation]:
        logprobs = Ragged(self.logprobs, self.tokens.lengths).rows()
        drawn = None if self.drawn is None else Ragged(self.drawn, self.tokens.lengths).rows()
        return [
            Generation(
                tokens.tolist(), logprobs[i].tolist(), reason, None if drawn is None else drawn[i].tolist()
            )
            for i, (tokens, reason) in enumerate(zip(self.tokens.rows(), self.reasons, strict=True))
        ]


@dataclass(frozen=True)
class OneWritten:
    """One continuation, while others are still written: no answer yet."""

    number: int
    generation: Generation


@dataclass(frozen=True)
class Scored:
    """Log-probs of the scored tokens of each sequence."""

    logprobs: Ragged


@dataclass(frozen=True)
class Likeliest:
    """The likeliest ids ``[n, k]`` at the scored tokens of each sequence, one after another."""

    ids: Ragged
    k: int

    @classmethod
    def of(cls, tables: Sequence[IdTable], k: int) -> Likeliest:
        width = tables[0].shape[1] if tables else k
        return cls(Ragged.of([table.reshape(-1) for table in tables], np.int32), width)

    def tables(self) -> list[IdTable]:
        return [row.reshape(-1, self.k) for row in self.ids.rows()]


@dataclass(frozen=True)
class Failed:
    """It raised an error."""

    message: str
    hint: str | None
    refused: bool
    """A ``ConfigError``."""


Question = Start | SetWeights | Rest | Generate | Score | FindLikeliest
Answer = Started | Done | Written | Scored | Likeliest | Failed
