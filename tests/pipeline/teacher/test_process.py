"""The local teacher process: starts, fails clearly, stops, and never outlives the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tropd.pipeline.teacher.process import LocalTeacher
from tropd.storage.errors import TropdError

SERVER = "import json, sys; print(json.dumps({'url': 'http://x'}), flush=True); sys.stdin.read()"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_starts_and_stops(tmp_path: Path) -> None:
    with LocalTeacher([sys.executable, "-c", SERVER], tmp_path / "log") as teacher:
        assert teacher.url == "http://x"
        process = teacher._process
        assert process is not None
        assert alive(process.pid)
    assert process.returncode == 0


def test_a_child_that_fails_is_explained_by_its_log(tmp_path: Path) -> None:
    code = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    with pytest.raises(TropdError, match=r"exit code 3(.|\n)*no such model"):
        with LocalTeacher([sys.executable, "-c", code], tmp_path / "log"):
            pass


def test_a_child_that_never_answers_is_given_up(tmp_path: Path) -> None:
    teacher = LocalTeacher(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], tmp_path / "log", start_seconds=0.5
    )
    with pytest.raises(TropdError, match="did not start within"):
        with teacher:
            pass


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tropd.pipeline.teacher.process import LocalTeacher\n"
        f"with LocalTeacher([sys.executable, '-c', {SERVER!r}], Path({str(tmp_path / 'log')!r})) as t:\n"
        "    print(t._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)
