"""The service's access log: one line of JSON per request, for people and for ``jq``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path


@dataclass
class Timing:
    """Times of a request's parts, in milliseconds; filled in by the code that does the work."""

    queue_ms: float | None = None
    """From its arrival in the queue to the start of its batch."""
    engine_ms: float | None = None
    """In the engine, together with its batch mates."""


@dataclass
class Access:
    """One request; fields it never reached are None."""

    client: str
    method: str
    path: str
    status: int = 0
    items: int | None = None
    """Sequences."""
    tokens: int | None = None
    """Tokens of all sequences, prompts included."""
    bytes_in: int | None = None
    bytes_out: int | None = None
    queue_ms: float | None = None
    engine_ms: float | None = None
    total_ms: float = 0.0
    error: str | None = None
    """The reason of a refusal."""


AccessLog = Callable[[Access], None]


def open_access_log(path: Path) -> AccessLog:
    """A log that appends to ``path``. A file that was moved away (logrotate) is made anew.

    A disk that is full costs lines and not requests: ``logging`` says so on standard error and continues.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = WatchedFileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.Logger("tropd.access")  # no part of the tree of loggers: its level is nobody else's
    log.addHandler(handler)

    def write(access: Access) -> None:
        plain = {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in asdict(access).items()
            if value is not None
        }
        log.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **plain}))

    return write
