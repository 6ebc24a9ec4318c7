"""The user's reward function: found without running it, called in processes of its own with a limit of time."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from tropd.pipeline.run.processes.child_environment import child_environment, is_rank
from tropd.pipeline.training.reward import worker
from tropd.storage.errors import ConfigError

IMPORT_SECONDS = 300.0
"""Longest time that the import of the module may take, with all that it imports."""


@dataclass(frozen=True)
class Missing:
    """A row has no reward, for this reason."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The function cannot be used as it is, for this reason."""

    reason: str


Value = float | list[float | None] | None
"""A reward of a row, or of each of its tokens; None: there is none."""


def function_folders(workspace: Path) -> list[Path]:
    """Where modules of the user are looked for before the installed ones."""
    return [workspace, Path.cwd()]


def module_file(function: str, folders: Sequence[Path]) -> Path:
    """The source file of the module in ``module:name``; nothing of the user's is run.

    Raises:
        ConfigError: no such module, or none with a source file.
    """
    module = function.partition(":")[0]
    path: list[str] | None = [str(folder) for folder in folders]
    name, spec = "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path) or (None if "." in name else PathFinder.find_spec(name))
        path = None if spec is None else list(spec.submodule_search_locations or [])
    file = Path(spec.origin) if spec is not None and spec.origin is not None else None
    if file is None or file.suffix != ".py":
        looked = ", ".join(map(str, folders))
        raise ConfigError(
            f"reward.function = {function!r}: there is no module {module!r} with a source file in {looked} or among the "
            "installed packages",
            hint=f"put {module.replace('.', '/')}.py into the workspace, or set reward.function to a module that exists",
        )
    return file


class FunctionPool:
    """Processes that call the function. Only JSON text goes in and out.

    Args:
        function: ``module:name``.
        folders: searched before the installed packages.
        log: file for what the function prints.
        seconds: longest time of one call; the process is then ended, and another started.
    """

    def __init__(
        self, function: str, folders: Sequence[Path], log: Path, *, workers: int, seconds: float
    ) -> None:
        self._function, self._seconds, self._log = function, seconds, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._pool = ProcessPool(
            max_workers=workers,
            context=multiprocessing.get_context("spawn"),
            initializer=worker.start,
            # A rank's function sees the rank's GPU, and takes itself for no rank; otherwise it sees all.
            initargs=(
                function,
                [str(folder) for folder in folders],
                str(log),
                child_environment(one_device=is_rank()),
            ),
        )

    def check(self) -> None:
        """Import the function, as calls will.

        Raises:
            ConfigError: the import fails, or takes too long.
        """
        answer = self._answer(self._pool.schedule(worker.call, args=("[]",), timeout=IMPORT_SECONDS), 0)
        for value in answer if isinstance(answer, list) else [answer]:
            raise ConfigError(
                f"reward.function = {self._function!r}: {value.reason if isinstance(value, Broken | Missing) else value}",
                hint=f"what it printed is in {self._log}",
            )

    def call(
        self, batches: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[list[Value | Missing] | Broken | Missing]:
        """For each batch: a value per row, or the reason why the batch has none."""
        futures = [
            self._pool.schedule(worker.call, args=(json.dumps(batch),), timeout=self._seconds)
            for batch in batches
        ]
        return [self._answer(future, len(batch)) for future, batch in zip(futures, batches, strict=True)]

    def _answer(self, future: Any, rows: int) -> list[Value | Missing] | Broken | Missing:
        try:
            answer = json.loads(future.result())
        except OutOfTime:
            return Missing(f"a call took longer than reward.seconds = {self._seconds:g}")
        except (ProcessExpired, CancelledError, RuntimeError, OSError) as error:
            return Broken(f"its process has ended ({error})")
        if "problem" in answer:
            return Broken(answer["problem"])
        found: list[Value | Missing] = answer["rewards"]
        if len(found) != rows:
            return Broken(f"it returned {len(found)} rewards for {rows} rows")
        return found

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()
