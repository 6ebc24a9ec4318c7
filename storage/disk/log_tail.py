"""The end of a log, for the message of an error."""

from __future__ import annotations

from pathlib import Path

LOG_LINES = 15


def end_of_log(log: Path, start: int) -> str:
    """The last lines that were written to a log after its first ``start`` bytes, indented below the first."""
    text = (log.read_bytes() if log.exists() else b"")[start:].decode(errors="replace")
    return "\n    ".join(text.splitlines()[-LOG_LINES:])
