"""Stopping between two steps: on Ctrl-C or SIGTERM the loop saves a checkpoint and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

LONGEST_NAP_SECONDS = 0.1


class StopRequestedError(Exception):
    """A stop was requested while the loop was waiting."""


class StopRequest:
    """A request to the loop to stop, once a signal or a caller has made it."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def end(self) -> None:
        """Ask without a signal: nothing that waits is needed any longer."""
        if self.signal is None:
            self.signal = 0

    def sleep(self, seconds: float) -> None:
        """Sleep in any thread; a request to stop ends it at once.

        Naps, because an Event must not be set in the handler of a signal that may have interrupted its own wait.

        Raises:
            StopRequestedError: a stop is requested.
        """
        end = time.monotonic() + seconds
        while not self and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_NAP_SECONDS))
        if self:
            raise StopRequestedError


@contextmanager
def stop_on_signal(request: StopRequest, word: str = "") -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM; a second one interrupts at once. Outside the main thread, nothing is caught.

    Args:
        word: said on standard error at the first one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = number
        if word:
            with suppress(OSError):
                os.write(2, f"\n{word}\n".encode())  # Python's own streams may be in the middle of a line

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
