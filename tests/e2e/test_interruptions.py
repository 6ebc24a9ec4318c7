"""Every stage killed at random moments and run again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import metrics
from waiting import eventually

from tropd.storage.disk.atomic import content_digest

KILLS = 5 if os.environ.get("TROPD_THOROUGH") else 2
# Stage, command, folder it writes, stages that must not be there yet.
STAGES = {
    "prepare": ("models", ("models", "prefixes", "scores", "train", "eval")),
    "generate-prefixes": ("prefixes", ("prefixes", "scores", "train", "eval")),
    "score-teacher": ("scores", ("scores", "train", "eval")),
    "train": ("train", ("train", "eval")),
    "evaluate": ("eval", ("eval",)),
}
# Training tiny models takes long: test_prepare_resumed.py kills it without a command around it.
COMMANDS = [pytest.param(c, marks=pytest.mark.slowest) if c == "prepare" else c for c in STAGES]


def state(workspace: Path, folder: str) -> Any:
    """Everything that must be equal between two runs of a stage."""
    if folder != "train":
        return content_digest(workspace / folder)
    manifest = json.loads((workspace / "train" / "manifest.json").read_text())
    # Which checkpoints are left depends on when a run was asked to stop; what the last one holds does not.
    shards = {name: manifest["shards"][name] for name in ("final", "checkpoints/step-000008")}
    samples = (workspace / "train" / "samples.jsonl").read_bytes()
    return {**manifest, "shards": shards, "checksum": None}, metrics(workspace), samples


def arguments(command: str, workspace: Path, url: str) -> list[str]:
    extra = ["--set", f"teacher.url={url}"] if command == "train" else []
    return [command, "-w", str(workspace), *extra]


@pytest.mark.parametrize("command", COMMANDS)
def test_kill_and_rerun_equals_an_undisturbed_run(
    tropd: Any, finished: Path, copy: Any, teacher_url: str, command: str
) -> None:
    folder, without = STAGES[command]
    undisturbed = copy(finished, *without, name="undisturbed")
    took = tropd.ok(*arguments(command, undisturbed, teacher_url)).seconds
    expected = state(undisturbed, folder)
    assert expected == state(finished, folder)
    generator = np.random.default_rng([ord(c) for c in command])
    workspace = copy(finished, *without, name="killed")
    killed = 0
    while killed < KILLS:
        # Each kill hits what the one before has left; what was faster than the kill is checked and begun anew.
        moment = float(generator.uniform(0.1, 0.9) * took)
        result = tropd(*arguments(command, workspace, teacher_url), after=moment)
        assert result.code in (0, -signal.SIGKILL), result.output
        if result.code == 0:
            assert state(workspace, folder) == expected
            shutil.rmtree(workspace / folder)
        killed += result.code != 0
    tropd.ok(*arguments(command, workspace, teacher_url))
    assert state(workspace, folder) == expected
    again = tropd.ok(*arguments(command, workspace, teacher_url))
    assert "done before" in again.output
    assert "nothing to do" in again.output
    assert state(workspace, folder) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_exits_130_and_is_resumed(
    tropd: Any, finished: Path, copy: Any, teacher_url: str, command: str
) -> None:
    folder, without = STAGES[command]
    workspace = copy(finished, *without)
    result = None
    for after in (0.3, 0.15, 0.08, 0.04):
        result = tropd(*arguments(command, workspace, teacher_url), after=after, signal=signal.SIGINT)
        if result.code != 0:
            break
        workspace = copy(finished, *without, name=f"again-{after}")
    assert result is not None
    assert result.code == 130, result.output
    tropd.ok(*arguments(command, workspace, teacher_url))
    assert state(workspace, folder) == state(finished, folder)


def test_sigterm_while_training_saves_a_checkpoint(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    long = ["--set", "train.steps=400", "--set", "train.checkpoint_every=400"]
    result = tropd(*arguments("train", workspace, teacher_url), *long, after=2.5, signal=signal.SIGTERM)
    assert result.code == 130, result.output
    assert "train: stopping after this step, with a checkpoint; once more stops at once" in result.output
    assert "a checkpoint was saved" in result.output
    (checkpoint,) = (workspace / "train" / "checkpoints").iterdir()
    steps = int(checkpoint.name.removeprefix("step-"))
    assert [r["step"] for r in metrics(workspace)] == list(range(steps))


@pytest.mark.parametrize("force", [False, True])
def test_the_hint_of_a_stopped_run_does_what_it_says_as_it_stands(
    tropd: Any, prepared: Path, finished: Path, copy: Any, teacher_url: str, force: bool
) -> None:
    workspace = copy(prepared)
    if force:
        shutil.copytree(finished / "train", workspace / "train")
    options = [*arguments("train", workspace, teacher_url), "--set", "train.keep_checkpoints=3"]
    stopped = tropd(*options, *(["--force"] if force else []), stop_at=2)
    assert stopped.code == 130, stopped.output
    found = re.search(r"→ run tropd (.*) to resume", stopped.output)
    assert found is not None, stopped.output
    words = shlex.split(found[1])
    assert "--force" not in words
    assert words.count("--set") == 2
    assert "resuming after step 3 of 8" in tropd.ok(*words).output
    assert state(workspace, "train") == state(finished, "train")
    assert (workspace / "train.old-1").exists() == force


@pytest.mark.slowest
def test_the_local_teacher_ends_with_a_killed_trainer(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    result = tropd("train", "-w", workspace, "--set", "train.steps=100000", after=12.0)
    assert result.code == -signal.SIGKILL
    eventually(lambda: not _processes(str(workspace)), 20, "the local teacher has ended")


def _processes(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line and "serve-teacher" in line]


@pytest.mark.slowest
def test_a_teacher_that_dies_pauses_training_which_resumes_to_the_same_end(
    tropd: Any, prepared: Path, copy: Any, finished: Path
) -> None:
    workspace = copy(prepared)
    command = [sys.executable, "-m", "tropd.cli.main", "serve-teacher", "-w", str(workspace), "--json"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    url = json.loads(service.stdout.readline())["url"]
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tropd.cli.main",
            *arguments("train", workspace, url),
            "--set",
            "teacher.timeout_seconds=2",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    has_a_step = lambda: (workspace / "train" / "metrics.jsonl").exists() and metrics(workspace)  # noqa: E731
    eventually(lambda: has_a_step() or trainer.poll() is not None, 60, "a step is on record")
    assert trainer.poll() is None
    service.kill()
    service.wait()
    _, errors = trainer.communicate(timeout=60)
    if trainer.returncode:  # unless the last steps were faster than the kill
        assert trainer.returncode == 1
        assert "waiting, nothing is lost" in errors
        assert "gave no answer" in errors
    tropd.ok("train", "-w", workspace)  # with a local service this time
    assert state(workspace, "train") == state(finished, "train")
