"""A reporter for tests."""

from __future__ import annotations

from typing import Any

from tropd.pipeline.run.progress import SILENT


class Listening:
    """A reporter that keeps what it is told, and is silent."""

    def __init__(self) -> None:
        self.said: list[str] = []
        """Warnings too."""
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(SILENT, name)

    def info(self, message: str) -> None:
        self.said.append(message)

    def warning(self, message: str) -> None:
        self.said.append(message)
        self.warnings.append(message)
