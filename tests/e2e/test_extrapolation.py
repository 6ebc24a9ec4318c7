"""Extrapolated weights in whole runs: killed, in two processes, and on the report's page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import final, metrics

SETTINGS = ("--set", "objective.extrapolation={most=16}", "--set", "train.learning_rate=3e-3")


@pytest.mark.slow
@pytest.mark.slowest
def test_a_killed_run_ends_with_the_same_bits(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    options = ["--set", f"teacher.url={teacher_url}", *SETTINGS]
    undisturbed, killed = (copy(prepared, name=name) for name in ("undisturbed", "killed"))
    took = tropd.ok("train", "-w", undisturbed, *options).seconds
    expected = metrics(undisturbed)
    due = [record["step"] for record in expected if "extrapolation_factor" in record]
    assert due == [0, 1, 3, 7]
    generator = np.random.default_rng(0)
    for _ in range(10 if os.environ.get("TROPD_THOROUGH") else 3):
        done = tropd("train", "-w", killed, *options, after=float(generator.uniform(0.3, 0.9) * took))
        assert done.code in (0, -signal.SIGKILL), done.output
    tropd.ok("train", "-w", killed, *options)
    assert final(killed) == final(undisturbed)
    assert metrics(killed) == expected
    tropd.ok("report", "-w", killed)
    assert "Scores of extrapolated weights" in (killed / "report" / "index.html").read_text()


@pytest.mark.slowest
def test_two_processes_extrapolate_as_one_does(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    options = ["--set", f"teacher.url={teacher_url}", *SETTINGS, "--set", "train.steps=4"]
    alone, both = copy(prepared, name="alone"), copy(prepared, name="both")
    tropd.ok("train", "-w", alone, *options)
    folder = Path(sys.executable).parent
    command = [folder / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", folder / "tropd"]
    done = subprocess.run(
        [*map(str, command), "train", "-w", str(both), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for one, other in zip(metrics(both), metrics(alone), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for name in ("extrapolation_accepted", "extrapolation_scores_tried"):
            assert one.get(name) == other.get(name)
    saved = json.loads(
        (both / "train" / "checkpoints" / "step-000004" / "tensors" / "files.json").read_text()
    )
    assert len(saved) == 2
