"""Work in a process of its own, beside the caller's: two models train on two cores."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from tropd.pipeline.run.processes.child_environment import become_child, child_environment
from tropd.storage.errors import TropdError

_STEP, _DONE = "step", "done"


class SecondProcess:
    """Calls ``target(*arguments, on_step)`` in a child process; leaving the context ends the child.

    The child is born with its work and says on a pipe when a step is done, so that it ends with its parent even
    where that is killed: nobody reads the pipe then, and writing fails. (A worker of a process pool waits for its
    work instead, forever if the parent is killed at that moment.)
    """

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_child, args=(writer, child_environment(), target, arguments), daemon=True
        )
        with _interrupts_held():
            self._process.start()
        writer.close()  # the child has the only one left: its end is the end of the pipe
        self.done = False
        """True if the call has returned."""

    def take_steps(self, wait: float = 0.0) -> int:
        """Steps done since the last call; waits at most ``wait`` seconds for one.

        Raises:
            TropdError: the child was killed.
            Exception: the one that ``target`` raised.
        """
        steps = 0
        while not self.done and self._reader.poll(0.0 if steps else wait):
            try:
                message = self._reader.recv()
            except EOFError:
                raise self._lost() from None
            if isinstance(message, Exception):
                raise message
            self.done = message == _DONE
            steps += message == _STEP
        return steps

    def _lost(self) -> TropdError:
        self._process.join()
        return TropdError(
            f"the process that makes the {self._name} ended without a result (exit code {self._process.exitcode})",
            hint="the system may be short of memory; run the same command again: finished work is kept",
        )

    def __enter__(self) -> SecondProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.done:  # Ctrl-C must not wait for the child to finish its work
            self._process.terminate()
        self._process.join()
        self._reader.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, which a terminal sends to the whole group: its parent ends it."""
    resource_tracker.ensure_running()  # starting it would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(
    writer: Connection,
    environment: Mapping[str, str],
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    become_child(environment)
    try:
        target(*arguments, lambda *_: writer.send(_STEP))
        writer.send(_DONE)
    except BrokenPipeError:
        pass  # the parent was killed: nobody waits for this work
    except Exception as error:
        error.add_note(traceback.format_exc())
        with suppress(BrokenPipeError):
            writer.send(error)
