"""Prefixes and scores, made by parts and gathered, survive SIGKILL at any durable operation byte by byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stage_faults.py")
# One operation in so many.
STRIDE = 4 if os.environ.get("TROPD_THOROUGH") else 50


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.slowest
def test_a_rerun_after_a_kill_gives_the_undisturbed_bytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(STRIDE)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, *points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == len(range(1, header["operations"] + 1, STRIDE)) > 200 // STRIDE
    assert [p for p in points if p["rerun"] != "done" or not p["same"] or p["findings"]] == []
    # Zarr's concurrent mkdirs make the count vary by a few: the last points may come after the end.
    assert sum(p["first"] == "killed" for p in points) >= len(points) - 3
