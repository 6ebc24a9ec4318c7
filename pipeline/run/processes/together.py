"""Several processes of one piece of work: they start together, and none is left when it ends, however it ends.

torchrun does not do for this: it kills its processes 30 seconds after it is asked to stop, which is less than a step
after which a checkpoint would be saved, and leaves them running if it is killed itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tropd.pipeline.run.interrupt import StopRequest, stop_on_signal
from tropd.pipeline.run.processes.child_environment import FOLLOWS
from tropd.storage.disk.log_tail import end_of_log
from tropd.storage.errors import InterruptedStageError, TropdError

POLL_SECONDS = 0.05
TICK_SECONDS = 1.0
SETTLE_SECONDS = 2.0
"""After one has failed, others may be about to say the same."""
GRACE_SECONDS = 15.0
"""Time to end by themselves for those that are no longer needed."""
ORPHAN_SECONDS = 1800.0
"""Time to save its state and end for a process whose starter is gone."""


@dataclass(frozen=True)
class Child:
    """A process to start."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None
    """The file that its output is appended to; None: it talks to this process's terminal."""


class Process(Protocol):
    """A process under way, here or elsewhere; its methods are those of ``subprocess.Popen``."""

    returncode: int | Any

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Running:
    """A child that has been started."""

    child: Child
    process: Process
    log_start: int
    """Bytes that its log had before."""


StartChild = Callable[[Child], AbstractContextManager[Running]]
"""Starts a child; at the end of the block it no longer runs."""


def tropd_command(name: str, workspace: Path, assignments: Sequence[str], *options: str) -> list[str]:
    """A command of this tropd on a workspace, with the ``--set`` overrides of a run."""
    overrides = [part for assignment in assignments for part in ("--set", assignment)]
    return [sys.executable, "-m", "tropd.cli.main", name, "--workspace", str(workspace), *overrides, *options]


def run_together(
    name: str,
    children: Sequence[Child],
    hint: str,
    *,
    tick: Callable[[], None] = lambda: None,
    start: StartChild | None = None,
) -> int:
    """Run processes until all have ended; if one fails, the others are ended.

    A request to stop (Ctrl-C, SIGTERM) is passed on once, and waited for: they may have something to save. A second one
    kills them.

    Args:
        name: of the work, for messages.
        hint: the remedy, if one fails.
        tick: called now and then meanwhile.
        start: starts them elsewhere than on this machine.

    Returns 0, or the exit code of the one that talks to the terminal, if it has failed and said so there.

    Raises:
        InterruptedStageError: they were asked to stop, and none of them talks to the terminal.
        TropdError: one has failed otherwise; the message has the end of its log.
    """
    stop = StopRequest()
    with ExitStack() as stack:
        stack.enter_context(stop_on_signal(stop))
        running = [stack.enter_context((start or _started)(child)) for child in children]
        asked, ticked = False, time.monotonic()
        while None in [one.process.poll() for one in running]:
            if stop and not asked:
                asked = True
                for one in running:
                    one.process.terminate()
            failed = [one for one in running if one.process.returncode]
            if failed and not asked:
                break
            time.sleep(POLL_SECONDS)
            if time.monotonic() - ticked > TICK_SECONDS:
                tick()
                ticked = time.monotonic()
        failed = [one for one in running if one.process.poll()]
        if not failed:
            return 0
        first = failed[0]
        if not asked:
            first = _culprit(first, running)
        _end(running)
        code = int(first.process.returncode)
        talker = next((one for one in running if one.child.log is None), None)
        if asked:
            if talker is not None and talker.process.returncode:
                return _as_exit_code(talker.process.returncode)
            raise InterruptedStageError(
                f"{name}: stopped; finished work is kept", hint="run the same command again to resume"
            )
        if first is talker and code > 0:
            return code
        raise TropdError(
            f"{name}: {first.child.name} of {len(children)} {_how(code)}{_end_of(first)}", hint=hint
        )


def follow_starter() -> None:
    """In a process started by ``run_together``: ask it to stop once the one that started it is gone.

    Standard input is a pipe that closes then. A process that saves nothing for half an hour is ended.
    """
    if os.environ.pop(FOLLOWS, None) is None:
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="follow-starter", daemon=True).start()


@contextlib.contextmanager
def _started(child: Child) -> Iterator[Running]:
    """The process; it is killed at the end of the block if it still runs."""
    start = 0
    with ExitStack() as stack:
        output = None
        if child.log is not None:
            child.log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(child.log.open("ab"))
            start = output.tell()
        # A session of its own: Ctrl-C reaches this process only, which passes it on.
        process = subprocess.Popen(
            child.command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**child.environment, FOLLOWS: "1"},
            start_new_session=True,
        )
    try:
        yield Running(child, process, start)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _culprit(first: Running, running: Sequence[Running]) -> Running:
    """The process to blame: of several that refuse the same settings, the one whose refusal was seen."""
    deadline = time.monotonic() + SETTLE_SECONDS
    talker = next((one for one in running if one.child.log is None), None)
    while talker is not None and talker.process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    same = talker is not None and talker.process.returncode == first.process.returncode == 2
    return talker if same and talker is not None else first


def _end(running: Sequence[Running]) -> None:
    alive = [one for one in running if one.process.poll() is None]
    for one in alive:
        one.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for one in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.0, deadline - time.monotonic()))


def _as_exit_code(code: int) -> int:
    return code if code > 0 else 128 - code


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"


def _end_of(one: Running) -> str:
    if one.child.log is None:
        return ""
    return f"; the end of {one.child.log}:\n    {end_of_log(one.child.log, one.log_start)}"
