"""A rank whose launcher is killed ends by itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from waiting import eventually

RANK = """
import time
from tropd.pipeline.run.processes.launcher import end_with_launcher
end_with_launcher(0.05)
print("ready", flush=True)
time.sleep(600)
"""
LAUNCHER = f"""
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}], stdout=subprocess.PIPE, text=True)
rank.stdout.readline()
print(rank.pid, flush=True)
rank.wait()
"""


def test_a_rank_ends_with_its_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    state = Path("/proc") / launcher.stdout.readline().strip() / "stat"
    time.sleep(0.2)
    assert state.exists()
    launcher.kill()
    launcher.wait()
    eventually(lambda: not state.exists() or ") Z " in state.read_text(), 20, "the rank has ended")
