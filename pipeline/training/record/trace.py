"""The time of a run by activity: seconds per step for the metrics, and on request a trace for ui.perfetto.dev."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tropd.pipeline.training.record.phase_memory import PhaseMemory

FILE_NAME = "trace.json"
_PIDS = 2**22
"""No system has a process with a larger number."""


class Timeline:
    """Collects spans of any thread.

    The trace is in Chrome's JSON array format, whose closing bracket may be missing: it is appended to as the run goes,
    also by a run that resumes.

    Args:
        trace: the file to append spans to; None for none.
        rank: of this process among those that train.
        collects: keep spans for another process, which has the file (see ``take_events``).
        memory: told when a span begins and ends.
    """

    def __init__(
        self,
        trace: Path | None,
        *,
        rank: int = 0,
        collects: bool = False,
        memory: PhaseMemory | None = None,
    ) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._threads: dict[int, int] = {}
        self._rank = rank
        self._collected: list[str] | None = [] if collects else None
        self._stream = None
        if trace is not None:
            # The rest of a last line that a kill cut short would spoil all that comes after it.
            whole = trace.read_bytes().rfind(b"\n") + 1 if trace.exists() else 0
            self._stream = trace.open("a", encoding="utf-8")
            self._stream.truncate(whole)
            if not whole:
                self._stream.write("[\n")

    @contextmanager
    def span(self, name: str, step: int) -> Iterator[None]:
        """Count the block's time as ``name`` of ``step``."""
        if self._memory is not None:
            self._memory.begin(name)
        wall, started = time.time(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if self._memory is not None:
                self._memory.end(name)
            with self._lock:
                self._seconds[step][name] += seconds
                self._write(name, step, wall, seconds)

    def take(self, step: int) -> dict[str, float]:
        """The seconds of a step so far, by name; forgotten here."""
        with self._lock:
            return dict(self._seconds.pop(step, {}))

    def take_events(self) -> list[str]:
        """Lines of the trace that this process has collected since the last call."""
        with self._lock:
            lines, self._collected = self._collected or [], None if self._collected is None else []
            return lines

    def add(self, lines: Iterable[str]) -> None:
        """Write the lines that another process has collected."""
        with self._lock:
            if self._stream is not None:
                self._stream.writelines(lines)

    def _write(self, name: str, step: int, wall: float, seconds: float) -> None:
        if self._stream is None and self._collected is None:
            return
        identity = threading.get_ident()
        if not self._threads and (self._rank or self._collected is not None):
            self._event(name="process_name", ph="M", tid=0, args={"name": f"process {self._rank}"})
        if identity not in self._threads:
            self._threads[identity] = len(self._threads)
            label = {"name": threading.current_thread().name}
            self._event(name="thread_name", ph="M", tid=self._threads[identity], args=label)
        self._event(
            name=name,
            ph="X",
            ts=round(wall * 1e6),
            dur=round(seconds * 1e6),
            tid=self._threads[identity],
            args={"step": step},
        )

    def _event(self, **fields: object) -> None:
        # Processes of several machines may have the same number.
        line = json.dumps({**fields, "pid": os.getpid() + self._rank * _PIDS}) + ",\n"
        if self._stream is not None:
            self._stream.write(line)
        elif self._collected is not None:
            self._collected.append(line)

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
