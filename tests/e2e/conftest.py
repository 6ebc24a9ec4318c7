"""The installed ``tropd``, driven from outside, on a workspace that is small enough for tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

CONFIG = Path(__file__).with_name("small.toml").read_text()


@dataclass(frozen=True)
class Result:
    """How a command line ended. ``code`` is negative for a signal."""

    code: int
    seconds: float
    output: str


class Tropd:
    """Runs command lines in forked children of one process that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), str(folder / "output")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, *argv: str | Path, **options: Any) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": [str(a) for a in argv], **options}) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def ok(self, *argv: str | Path, **options: Any) -> Result:
        """As a call, but the command has to succeed."""
        result = self(*argv, **options)
        assert result.code == 0, f"{argv}: {result.output}"
        return result

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def tropd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tropd]:
    runner = Tropd(tmp_path_factory.mktemp("zygote"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def teacher_url(prepared: Path) -> Iterator[str]:
    """A teacher service that outlives single training runs, so that they need not start their own."""
    command = [sys.executable, "-m", "tropd.cli.main", "serve-teacher", "-w", str(prepared), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["url"]
    process.terminate()
    assert process.wait(20) == 0


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A workspace of this process's own, copied from one that the first of all test processes makes."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    original = folder / f"{name}-original"
    with FileLock(folder / f".{name}.lock"):
        if not original.exists():
            make(folder / f"{name}-unfinished")
            (folder / f"{name}-unfinished").rename(original)
    return Path(shutil.copytree(original, tmp_path_factory.mktemp(name) / "run"))


@pytest.fixture(scope="session")
def prepared(tropd: Tropd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with models, prefixes and scores."""

    def make(workspace: Path) -> None:
        tropd.ok("init", workspace, "--recipe", "demo")
        (workspace / "config.toml").write_text(CONFIG)
        for stage in ("prepare", "generate-prefixes", "score-teacher"):
            tropd.ok(stage, "-w", workspace)

    return made_once(tmp_path_factory, "prepared", make)


@pytest.fixture(scope="session")
def finished(
    tropd: Tropd, prepared: Path, teacher_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A workspace with every stage done."""

    def make(workspace: Path) -> None:
        shutil.copytree(prepared, workspace)
        tropd.ok("train", "-w", workspace, "--set", f"teacher.url={teacher_url}")
        tropd.ok("evaluate", "-w", workspace)

    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture
def copy(tmp_path: Path) -> Any:
    """Copy a workspace, without the stages named, for a test to do with as it likes."""

    def make(source: Path, *without: str, name: str = "run") -> Path:
        target = tmp_path / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("logs", *without))
        return target

    return make
