"""The reporter to which a stage tells its progress, independent of any display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Task(Protocol):
    """A running piece of work."""

    def advance(self, amount: float = 1, **values: object) -> None:
        """``amount`` more units are done; ``values`` are shown beside the bar (loss=0.12)."""


class Steps(Protocol):
    """A training run in progress."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One more step is done; ``record`` are its metrics."""


class Reporter(Protocol):
    """Receives progress. The command line draws bars; tests and libraries may pass ``SILENT``."""

    def task(
        self, description: str, total: float, *, done: float = 0, unit: str = "it"
    ) -> AbstractContextManager[Task]: ...

    def training(
        self, title: str, total: int, earlier: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> AbstractContextManager[Steps]:
        """Training of ``total`` steps, of which those in ``earlier`` are done.

        Args:
            settings: values by dotted path, for verdicts on the steps so far.
        """

    def waiting(self, description: str) -> AbstractContextManager[None]:
        """Something without steps that may take a while, such as loading a model."""

    def info(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...


class _SilentTask:
    def advance(self, amount: float = 1, **values: object) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        yield _SilentTask()

    @contextmanager
    def training(
        self, title: str, total: int, earlier: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[Steps]:
        yield _SilentTask()

    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        yield

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass


SILENT: Reporter = _Silent()
