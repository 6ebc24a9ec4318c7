"""Steps that are prepared while the one before trains: rows one update old, and as reproducible as without."""

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
from waiting import eventually

# Kills of a run of sixty steps, strict and one step ahead.
KILLS = ((0, 12), (1, 8)) if os.environ.get("TROPD_THOROUGH") else ((0, 1), (1, 2))
AHEAD = ("--set", "train.max_staleness=1")
# What the rows and the teacher decide, whatever the weights in training.
OF_ROWS = ("tokens_on_policy", "teacher_topk_tokens", "k1_mean", "response_length_mean", "acceptance_mean")


def result(workspace: Path) -> Any:
    """The final weights, the last checkpoint and the metrics."""
    shards = json.loads((workspace / "train" / "manifest.json").read_text())["shards"]
    checkpoints = sorted(name for name in shards if name.startswith("checkpoints/"))
    return final(workspace), {name: shards[name] for name in checkpoints[-1:]}, metrics(workspace)


def test_rows_are_those_of_the_weights_before_the_last_update(
    tropd: Any, prepared: Path, finished: Path, copy: Any, teacher_url: str
) -> None:
    ahead = copy(prepared)
    tropd.ok("train", "-w", ahead, "--set", f"teacher.url={teacher_url}", *AHEAD, "--set", "train.trace=true")
    found, strict = metrics(ahead), metrics(finished)

    def of_rows(record: dict[str, Any]) -> list[float]:
        return [record[name] for name in OF_ROWS]

    assert of_rows(found[0]) == of_rows(strict[0])
    assert of_rows(found[1]) != of_rows(strict[1])
    assert found[0]["importance_max"] == pytest.approx(1.0, abs=1e-4)
    # In step 1 the weights have been updated once since its rows were sampled.
    assert all(record["importance_max"] > 1.001 for record in found[1:])
    assert [r["step"] for r in found] == list(range(8))

    trace = (ahead / "train" / "trace.json").read_text()
    events = json.loads(trace.rstrip().rstrip(",") + "]")
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in spans} >= {"rollout", "score", "wait", "train", "optimizer", "sync", "total"}
    # The rollout of step 5 begins before step 4 has ended.
    of = {(e["name"], e["args"]["step"]): e for e in spans}
    assert of["rollout", 5]["ts"] < of["total", 4]["ts"] + of["total", 4]["dur"]
    assert of["rollout", 5]["tid"] != of["train", 5]["tid"]


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "kills"), KILLS)
@pytest.mark.slowest
def test_sixty_steps_killed_at_random_end_as_if_undisturbed(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str, staleness: int, kills: int
) -> None:
    options = ["--set", f"teacher.url={teacher_url}", "--set", f"train.max_staleness={staleness}"]
    options += ["--set", "train.steps=60", "--set", "train.checkpoint_every=3"]
    options += ["--set", "service.batch_tokens=200"]  # several requests a step, while rows are written
    undisturbed, workspace = copy(prepared, name="undisturbed"), copy(prepared, name="killed")
    took = tropd.ok("train", "-w", undisturbed, *options).seconds
    expected = result(undisturbed)
    assert [r["step"] for r in expected[2]] == list(range(60))
    generator = np.random.default_rng(staleness)
    killed, begun = 0, 0
    while killed < kills:
        done = tropd("train", "-w", workspace, *options, after=float(generator.uniform(0.25, 0.7) * took))
        assert done.code in (0, -signal.SIGKILL), done.output
        if done.code == 0:
            assert result(workspace) == expected
            begun += 1
            workspace = copy(prepared, name=f"killed-{begun}")
        killed += done.code != 0
    tropd.ok("train", "-w", workspace, *options)
    assert result(workspace) == expected


@pytest.mark.slowest
def test_ids_that_the_student_chose_are_those_of_before_after_a_kill(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    """One step ahead: the weights that chose them are gone when the run goes on, and the ids are in the checkpoint."""
    options = [*AHEAD, "--set", f"teacher.url={teacher_url}", "--set", "objective.name=rkl-topk"]
    options += ["--set", "objective.k=5", "--set", "train.checkpoint_every=1"]
    undisturbed, workspace = copy(prepared, name="undisturbed"), copy(prepared, name="killed")
    took = tropd.ok("train", "-w", undisturbed, *options).seconds
    for share in (0.6, 0.75):
        done = tropd("train", "-w", workspace, *options, after=share * took)
        assert done.code in (0, -signal.SIGKILL), done.output
    tropd.ok("train", "-w", workspace, *options)
    assert result(workspace) == result(undisturbed)


@pytest.mark.slowest
def test_a_stopped_run_keeps_the_rows_that_are_there_already(
    prepared: Path, copy: Any, teacher_url: str
) -> None:
    options = [*AHEAD, "--set", f"teacher.url={teacher_url}", "--set", "train.steps=100000"]
    options += ["--set", "train.checkpoint_every=100000"]
    workspace = copy(prepared)
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tropd.cli.main", "train", "-w", str(workspace), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: len(metrics(workspace)) >= 3, 60, "three steps are on record")
    trainer.terminate()
    _, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == 130, errors
    assert "a checkpoint was saved" in errors
    (checkpoint,) = (workspace / "train" / "checkpoints").iterdir()
    assert (checkpoint / "rows.safetensors").exists()
    assert len(metrics(workspace)) == int(checkpoint.name.removeprefix("step-"))


@pytest.mark.slowest
def test_the_sampling_process_ends_with_a_killed_trainer(prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    options = [*AHEAD, "--set", f"teacher.url={teacher_url}", "--set", "train.steps=100000"]
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tropd.cli.main", "train", "-w", str(workspace), *options],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TROPD_TEST_MARK": str(workspace)},
    )
    eventually(lambda: len(metrics(workspace)) >= 2, 60, "two steps are on record")
    assert len(_marked(str(workspace))) >= 2
    trainer.kill()
    trainer.wait()
    eventually(lambda: not _marked(str(workspace)), 60, "the sampling process has ended")


def _marked(mark: str) -> list[str]:
    """Living processes that were started with the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TROPD_TEST_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.slowest
def test_two_processes_ahead_are_as_good_as_one(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    options = ["--set", f"teacher.url={teacher_url}", *AHEAD]
    alone, both = copy(prepared, name="alone"), copy(prepared, name="both")
    tropd.ok("train", "-w", alone, *options)
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["--no-python", Path(sys.executable).parent / "tropd", "train", "-w", both, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for one, other in zip(metrics(both), metrics(alone), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["tokens_on_policy"] == other["tokens_on_policy"]
