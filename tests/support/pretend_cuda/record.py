"""All that makes the host wait for the device, by line of the project."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = str(Path(__file__).parents[3]) + "/"
HERE = str(Path(__file__).parent) + "/"


@dataclass
class Record:
    """Counts of what happened while it was the record."""

    waits: Counter[str] = field(default_factory=Counter)
    """Times that the host waited, by place and reason."""
    operations: Counter[str] = field(default_factory=Counter)
    """Operations on device tensors, by name."""

    def wait(self, reason: str) -> None:
        self.waits[f"{where()}: {reason}"] += 1

    @property
    def total(self) -> int:
        return sum(self.waits.values())


def where() -> str:
    """The innermost line of the project, with that of transformers below it, where there is one."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT) and not name.startswith(HERE) and "site-packages" not in name:
            return f"{name.removeprefix(PROJECT)}:{frame.f_lineno}{library}"
        if not library and "site-packages/transformers/" in name:
            library = f" (transformers/{name.rsplit('transformers/', 1)[-1]}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
