"""Waiting for what happens in its own time: with a deadline, and a failure that says what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def eventually(happens: Callable[[], Found], seconds: float, why: str) -> Found:
    """The first true value that a call gives.

    Args:
        seconds: for how long it may give none.
        why: what is waited for, as the failure says it: "the service is ready".

    Raises:
        AssertionError: after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why}"
        time.sleep(0.01)
    return found
