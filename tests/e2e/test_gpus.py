"""Commands with ``--gpus 2`` on a CPU: what one process makes, and after a kill nothing runs and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import eventually

pytestmark = pytest.mark.slowest


def start(*argv: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tropd.cli.main", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def records(workspace: Path) -> list[dict[str, Any]]:
    path = workspace / "train" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ranks(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that train, by their rank."""
    found = {}
    for one in psutil.Process(process.pid).children(recursive=True):
        rank = one.environ().get("RANK")
        if rank is not None:
            found[rank] = one
    return found


def all_ended(family: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)


@pytest.mark.parametrize(
    ("victim", "on_ray"),
    [("1", False), ("launcher", False), pytest.param("1", True, marks=pytest.mark.thorough)],
)
def test_a_killed_process_ends_all_and_the_same_command_resumes(
    victim: str, on_ray: bool, prepared: Path, finished: Path, copy: Any, teacher_url: str
) -> None:
    if on_ray:
        pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    workspace = copy(prepared)
    slow = ("--set", "train.checkpoint_every=2")
    where = ("--executor", "ray") if on_ray else ("--gpus", "2")
    command = ("train", "-w", workspace, *where, "--set", f"teacher.url={teacher_url}", *slow)
    process = start(*command)
    eventually(
        lambda: len(records(workspace)) >= 3 or process.poll() is not None, 120, "three steps are on record"
    )
    family = psutil.Process(process.pid).children(recursive=True)
    (process if victim == "launcher" else ranks(process)[victim]).send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    eventually(lambda: all_ended(family), 60, "nothing is left running")
    if victim == "1":
        assert process.returncode == 1, output
        assert "train: process 1 of 2 was killed (SIGKILL); the end of" in output
    assert len(records(workspace)) < 8
    again = start(*command)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    told = (workspace / "logs" / "train-rank-0.log").read_text() if on_ray else output
    assert "train: resuming after step" in told
    assert on_ray or "no GPU is visible: 2 processes on the CPU" in output
    found, expected = records(workspace), records(finished)
    assert [r["step"] for r in found] == list(range(8))
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_data_stages_and_evaluation_give_the_same_bytes(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished)
    for stage, command in (
        ("prefixes", "generate-prefixes"),
        ("scores", "score-teacher"),
        ("eval", "evaluate"),
    ):
        tropd.ok(command, "-w", workspace, "--force", "--gpus", "2")
        ours, theirs = (json.loads((w / stage / "manifest.json").read_text()) for w in (workspace, finished))
        assert ours["fingerprint"] == theirs["fingerprint"]
        if stage != "eval":  # responses to held-out prompts are reused there, and equal up to rounding
            assert ours["shards"] == theirs["shards"]
        else:
            assert ours["summary"]["accuracy"] == theirs["summary"]["accuracy"]
        assert not (workspace / f"{stage}.parts").exists()
    assert list((workspace / "logs").glob("scores-part-*.log"))


def test_each_process_asks_a_teacher_of_its_own_and_the_losses_are_those_of_one(
    tropd: Any, prepared: Path, finished: Path, copy: Any
) -> None:
    workspace = copy(prepared)
    tropd.ok("train", "-w", workspace, "--gpus", "2", "--set", "train.trace=true")
    assert {path.name for path in (workspace / "logs").glob("teacher-service*.log")} == {
        "teacher-service.log",
        "teacher-service-rank-1.log",
    }
    asked = [
        json.loads(line) for line in (workspace / "logs" / "teacher-access.jsonl").read_text().splitlines()
    ]
    scored = [one for one in asked if one["path"] == "/v1/score"]
    assert len(scored) == 2 * 8  # a share of each step to each
    for one, other in zip(records(workspace), records(finished), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert len(one["exchange_seconds"]) == 2
    trace = json.loads((workspace / "train" / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert len({event["pid"] for event in trace if event["name"] == "train"}) == 2
