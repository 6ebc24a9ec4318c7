"""``tropd train`` on a terminal and in a pipe, and ``tropd watch`` beside it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

TROPD = [sys.executable, "-m", "tropd.cli.main"]


def on_terminal(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of a command that believes to talk to a person."""
    leader, follower = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": "110",
        "LINES": "40",
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*TROPD, *map(str, arguments)], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    output = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    os.close(leader)
    return process.wait(60), output.decode(errors="replace")


def test_training_on_a_terminal_shows_a_dashboard(prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    code, output = on_terminal("train", "-w", workspace, "--set", f"teacher.url={teacher_url}")
    assert code == 0, output
    for words in ("8/8 steps", "tokens/s", "outliers", "reward", "with alternatives", "memory"):
        assert words in output
    assert "▁" in output


def test_watch_shows_a_finished_run_and_ends(finished: Path) -> None:
    code, output = on_terminal("watch", "-w", finished)
    assert code == 0
    assert "finished" in output
    assert "8/8 steps" in output


def test_watch_in_a_pipe_is_one_line_or_one_object(tropd: Any, finished: Path, prepared: Path) -> None:
    assert "tropd · seed 0: finished, 8/8 steps" in tropd.ok("watch", "-w", finished).output
    found = json.loads(tropd.ok("watch", "-w", finished, "--json").output)
    assert (found["state"], found["steps"], found["last"]["step"]) == ("finished", 8, 7)
    refused = tropd("watch", "-w", prepared)
    assert refused.code == 1
    assert "no training has begun" in refused.output
