"""A reporter for tests."""

from __future__ import annotations

from typing import Any

from tropd.pipeline.run.progress import SILENT


class Listening:
    """A reporter that keeps what it is warned of, and is silent."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(SILENT, name)

    def warning(self, message: str) -> None:
        self.warnings.append(message)
