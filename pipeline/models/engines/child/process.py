"""The trainer's side of an engine in a process of its own: a ``Sampler`` that can also score, rest, and take weights.

Every question has a deadline. A process that misses it is ended, and the error says how long it had, which setting gives
it longer, and what it said last.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.models.engines.base import Finished, Generation, IdTable, Sampling
from tropd.pipeline.models.engines.child import serve
from tropd.pipeline.models.engines.child.messages import (
    Answer,
    Build,
    Done,
    Failed,
    FindLikeliest,
    Generate,
    Likeliest,
    OneWritten,
    Question,
    Ragged,
    Rest,
    Score,
    Scored,
    SetWeights,
    Start,
    Started,
    Written,
)
from tropd.pipeline.models.engines.child.weights import handles, layout_of, open_memory, views
from tropd.storage.disk.log_tail import end_of_log
from tropd.storage.errors import ConfigError, TropdError

STOP_SECONDS = 10.0

Expected = TypeVar("Expected", bound=Answer)


@dataclass(frozen=True)
class Deadline:
    """How long a question may take, and the setting that says so."""

    seconds: float
    setting: str


@dataclass(frozen=True)
class Deadlines:
    """Of an engine's start, of its updates (with falling asleep and waking up), and of its answers."""

    start: Deadline
    update: Deadline
    answer: Deadline


class EngineProcess:
    """Starts the process and waits until it is ready and rests; weights are set before it samples.

    Args:
        build: makes the engine there; it is pickled.
        state: the model's state: names, shapes, types and device of the weights to come.
        dtype: the engine's precision, to which weights are cast.
        environment: of the process.
        log: where its output goes.
        as_handles: weights go over as handles of the GPU's memory that ``state`` is on.

    Raises:
        TropdError, ConfigError: it cannot be built; it ended, or was not ready in time.
    """

    def __init__(
        self,
        build: Build,
        state: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        environment: Mapping[str, str],
        log: Path,
        deadlines: Deadlines,
        as_handles: bool = False,
    ) -> None:
        self._dtype = dtype
        self._log = log
        self._deadlines = deadlines
        self._lock = threading.Lock()
        layout = layout_of(state, dtype)
        memory = None if as_handles else open_memory(layout.num_bytes)
        self._shared = {} if memory is None else views(memory, layout)
        self._connection, theirs = Pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._log_start = stream.tell()  # an earlier process wrote all before it
            # A session of its own: Ctrl-C reaches the trainer only.
            self._process = subprocess.Popen(
                [sys.executable, "-m", serve.__name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env=dict(environment),
                pass_fds=[theirs.fileno(), *([] if memory is None else [memory])],
                start_new_session=True,
            )
        theirs.close()
        try:
            started = self._ask(Start(build, layout, memory), Started, deadlines.start, "started")
        except BaseException:
            self.close()
            raise
        self._max_length, self.sleeps = started.max_length, started.sleeps

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def set_weights(self, state: Mapping[str, Tensor]) -> None:
        """Wake the engine up with these weights, of the state that it was started for.

        Raises:
            TropdError: it ended, or took longer than its deadline.
        """
        kept: list[Tensor] = []
        update = None
        if self._shared:
            for name, value in state.items():
                self._shared[name].copy_(value.detach())
        else:
            update, kept = handles(state, self._dtype)
        self._ask(SetWeights(update), Done, self._deadlines.update, "taken the student's new weights")
        kept.clear()

    def rest(self) -> None:
        """Free the engine's memory until weights are set, where it can.

        Raises:
            TropdError: see ``set_weights``.
        """
        if self.sleeps:
            self._ask(Rest(), Done, self._deadlines.update, "fallen asleep")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Generation]:
        """See ``Sampler.generate``.

        Raises:
            TropdError: see ``set_weights``; or the engine's own.
        """
        rows, tells = Ragged.of(prompts, np.int32), finished is not None
        question = Generate(rows, sampling, tuple(seeds), tuple(max_tokens), tells)
        did = f"answered {len(prompts)} prompts"
        return self._ask(question, Written, self._deadlines.answer, did, finished).generations()

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs of ``sequence[start:]`` for each sequence (see ``Engine.score``).

        Raises:
            TropdError: see ``generate``.
        """
        question = Score(Ragged.of(sequences, np.int32), tuple(starts))
        answer = self._ask(question, Scored, self._deadlines.answer, f"scored {len(sequences)} responses")
        return answer.logprobs.rows()

    def choose(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], k: int, limit: int
    ) -> list[IdTable]:
        """The k likeliest ids below ``limit`` at each token from the starts (see ``Choose``).

        Raises:
            TropdError: see ``generate``.
        """
        question = FindLikeliest(Ragged.of(sequences, np.int32), tuple(starts), k, limit)
        done = f"found the likeliest ids of {len(sequences)} responses"
        return self._ask(question, Likeliest, self._deadlines.answer, done).tables()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for stop in (lambda: None, self._process.kill):
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
                break
        self._connection.close()

    def _ask(
        self,
        question: Question,
        kind: type[Expected],
        deadline: Deadline,
        did: str,
        finished: Finished | None = None,
    ) -> Expected:
        with self._lock:
            end = time.monotonic() + deadline.seconds
            try:
                self._connection.send(question)
                while True:
                    if not self._connection.poll(max(0.0, end - time.monotonic())):
                        raise self._late(deadline, did)
                    answer: Answer | OneWritten = self._connection.recv()
                    if not isinstance(answer, OneWritten):
                        break
                    if finished is not None:
                        finished(answer.number, answer.generation)
            except (EOFError, OSError) as error:
                raise self._ended(did) from error
        if isinstance(answer, Failed):
            failure = ConfigError if answer.refused else TropdError
            raise failure(answer.message, hint=answer.hint or f"its log is {self._log}")
        assert isinstance(answer, kind)
        return answer

    def _late(self, deadline: Deadline, did: str) -> TropdError:
        self._process.kill()  # it may hang, and take no notice of anything else
        self._process.wait()
        return TropdError(
            f"the process of the student's engine had not {did} after {deadline.seconds:g} s and was ended"
            f"{self._said()}",
            hint=f"if it was at work, raise {deadline.setting} (now {deadline.seconds:g}); the same command resumes "
            "from the last checkpoint",
        )

    def _ended(self, did: str) -> TropdError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        code = self._process.poll()
        how = "has closed its pipe" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return TropdError(
            f"the process of the student's engine {how} before it had {did}{self._said()}",
            hint="if the system ended it for memory, lower vllm.gpu_memory_utilization or rollout.max_tokens; the same "
            "command resumes from the last checkpoint",
        )

    def _said(self) -> str:
        return f"; the end of {self._log}:\n    {end_of_log(self._log, self._log_start)}"
