"""The student's sampler in its own process, so that it samples for the next step while this one trains.

Threads would not do: decoding is many small operations, each of which needs the interpreter. Weights go through shared
memory; they are written between two calls, and read at the next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import torch
from pebble import ProcessExpired, ProcessPool
from torch import Tensor

from tropd.pipeline.models.engines.base import Finished, Generation, IdTable, Sampling, choose_with
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.run.processes.child_environment import become_child, child_environment
from tropd.storage.errors import TropdError

SamplerBuild = Callable[[], TransformersEngine]
Told = TypeVar("Told")


class SamplingProcess:
    """A ``Sampler`` whose model lives in another process.

    Args:
        build: makes the engine there; it is pickled.
        state: the model's state, by whose names, shapes and types shared memory is made.
        max_length: most tokens of a sequence.
    """

    def __init__(self, build: SamplerBuild, state: Mapping[str, Tensor], max_length: int) -> None:
        self._max_length = max_length
        self._shared = {
            name: torch.empty(value.shape, dtype=value.dtype).share_memory_() for name, value in state.items()
        }
        self._version = 0
        self._pool = ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(child_environment(), build, self._shared),
        )
        # A process starts with its first task: with one that does nothing, while the trainer gets ready.
        self._pool.schedule(int)

    @property
    def max_length(self) -> int:
        return self._max_length

    def set_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Sample with these from the next call on. No call may be under way."""
        for name, value in tensors:
            self._shared[name].copy_(value)
        self._version += 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Generation]:
        """See ``Sampler.generate``; ``finished`` hears nothing, as all continuations come over together.

        Raises:
            TropdError: the process has ended.
        """
        plain = [list(prompt) for prompt in prompts]
        return self._call(_generate, plain, sampling, list(seeds), list(max_tokens))

    def choose(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], k: int, limit: int
    ) -> list[IdTable]:
        """The k likeliest ids below ``limit`` at every token from its sequence's start (see ``Choose``).

        Raises:
            TropdError: the process has ended.
        """
        return self._call(_choose, [list(sequence) for sequence in sequences], list(starts), k, limit)

    def _call(self, function: Callable[..., Told], *arguments: Any) -> Told:
        try:
            reply: Told = self._pool.schedule(function, args=(self._version, *arguments)).result()
        except (ProcessExpired, CancelledError, RuntimeError) as error:
            raise TropdError(
                f"the process that samples for the student has ended ({error})",
                hint="if the system killed it for memory, set train.max_staleness = 0 or lower rollout.batch_size",
            ) from error
        return reply

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pool.stop()
        self._pool.join()


_engine: TransformersEngine | None = None
_weights: Mapping[str, Tensor] = {}
_loaded = 0


def _start(environment: Mapping[str, str], build: SamplerBuild, shared: Mapping[str, Tensor]) -> None:
    global _engine, _weights
    become_child(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _engine, _weights = build(), shared


def _end_with_parent() -> None:
    """A trainer that is killed says nothing; its process object notices."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _generate(
    version: int,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int],
    max_tokens: list[int],
) -> list[Generation]:
    return _current(version).generate(prompts, sampling, seeds=seeds, max_tokens=max_tokens)


def _choose(version: int, sequences: list[list[int]], starts: list[int], k: int, limit: int) -> list[IdTable]:
    return choose_with(_current(version))(sequences, starts, k, limit)


def _current(version: int) -> TransformersEngine:
    """The engine, with the weights of a version."""
    global _loaded
    assert _engine is not None
    if version != _loaded:
        _engine.model.load_state_dict(_weights)
        _loaded = version
    return _engine
