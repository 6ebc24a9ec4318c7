"""A teacher service in its own process, for as long as a training run needs it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType

from tropd.pipeline.run.processes.child_environment import child_environment
from tropd.pipeline.run.processes.together import tropd_command
from tropd.storage.disk.log_tail import end_of_log
from tropd.storage.errors import TropdError

START_SECONDS = 600.0
STOP_SECONDS = 10.0


class LocalTeacher:
    """Context manager: starts ``command``, which prints ``{"url": …}`` on a line, and stops it at the end.

    Loading a model takes a while, in which the caller may do something else: ``wait`` when the address is needed.

    The child's standard input is a pipe that closes with this process, however it ends: no orphan stays behind.

    ``process`` is the child, once it is started.

    Args:
        command: the process to start.
        log: where its standard error goes.
        one_device: it sees the GPU of this process only; otherwise all of them, as a model spread over several needs.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        start_seconds: float = START_SECONDS,
        one_device: bool = True,
    ) -> None:
        self._url = ""
        self._command = list(command)
        self._one_device = one_device
        self._log = log
        self._start_seconds = start_seconds
        self._log_start = 0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LocalTeacher:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            self._log_start = log.tell()  # an earlier service wrote all before it
            # A session of its own: Ctrl-C reaches the trainer only, which stops this when it has saved its state.
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=child_environment(one_device=self._one_device),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def wait(self) -> str:
        """The address, once the service answers there.

        Raises:
            TropdError: it ended, or took too long; the message has the end of its log.
        """
        self._url = self._url or self._wait_for_url()
        return self._url

    def _wait_for_url(self) -> str:
        process = self.process
        assert process is not None
        lines: Queue[str] = Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if not self._url:  # later output is read, lest the pipe fill, and dropped
                    lines.put(line)

        threading.Thread(target=read, daemon=True).start()
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Empty, ValueError, KeyError, TypeError, RecursionError):
                return str(json.loads(lines.get(timeout=0.1))["url"])
            if process.poll() is not None and lines.empty():
                raise self._failure(
                    f"the teacher service ended with exit code {process.returncode} while starting"
                )
        raise self._failure(f"the teacher service did not start within {self._start_seconds:.0f} s")

    def _failure(self, message: str) -> TropdError:
        tail = end_of_log(self._log, self._log_start)
        return TropdError(
            f"{message}; the end of {self._log}:\n    {tail}", hint="tropd serve-teacher shows it live"
        )

    def _stop(self) -> None:
        process = self.process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        # A service that is still loading its model does not look at its input yet, and has nothing to lose.
        for stop in (lambda: None, process.terminate, process.kill)[not self._url :]:
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                break


def serve_command(workspace: Path, assignments: Sequence[str], domain: str = "") -> list[str]:
    """The command that serves a run's teacher (with ``domain``, that of the domain)."""
    options = ["--domain", domain] if domain else []
    options += ["--port", "0", "--exit-with-parent", "--json"]
    return tropd_command("serve-teacher", workspace, assignments, *options)
