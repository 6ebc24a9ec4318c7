"""torchrun with two processes, each with a real vLLM beside it: as good as one, and resumed after kills of any part."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment that has it")

import psutil
from waiting import eventually

from tropd.pipeline.models.engines.child import serve

STEPS = 30 if os.environ.get("TROPD_THOROUGH") else 8
SMALL = (
    *("train.checkpoint_every=2", "train.evaluate_every=5", f"train.steps={STEPS}", "vllm.check_every=1"),
    *("rollout.prompts_per_step=8", "train.learning_rate=1e-3", "teacher.timeout_seconds=5"),
)
PARTS = ("rank", "engine", "service", "launcher")
# Parts of a run that are killed one after another, and which of its processes.
SAMPLE = [("rank", 1), ("engine", 0)]
EACH = [("rank", 0), ("engine", 1), ("service", 0), ("launcher", 0)]
KILLS = [*EACH, *reversed(EACH), *SAMPLE] if os.environ.get("TROPD_THOROUGH") else SAMPLE
# Of a record: times, memory, how often the service was asked again, and the checksum over all that.
OF_THIS_MACHINE = ("time_", "memory_", "mfu_", "teacher_retries", "exchange_seconds", "checksum")


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_two_processes_with_an_engine_each_are_as_good_as_one(
    demo: Any, alone: Any, stage: Any, torchrun: Any, records: Any, tmp_path: Path
) -> None:
    workspace, said = demo.copy("two-processes"), tmp_path / "said"
    process = torchrun(workspace, said, "--set", "teacher.engine=vllm", "--set", "vllm.check_every=1")
    assert process.wait(600) == 0, said.read_text()[-3000:]
    found = records(workspace)
    assert len(found) == 100
    # Rows of a step are written by both engines: after each update both have the trainer's weights. None is a step in
    # which the teacher's prefixes fill all responses.
    differences = [record["sampler_logprob_difference_max"] for record in found]
    assert len([value for value in differences if value is not None]) > 80
    assert max(value for value in differences if value is not None) < 1e-4
    logs = sorted(path.name for path in (workspace / "logs").glob("student-engine-*"))
    assert logs == ["student-engine-0.log", "student-engine-1.log"]
    assert "cannot sleep on a CPU" in said.read_text()
    options = ("--set", "student.engine=vllm", "--set", "teacher.engine=vllm")
    after = stage("evaluate", workspace, *options)["accuracy"]["after"]
    for mode in ("greedy", "sampled"):
        assert abs(after[mode] - alone.accuracy["after"][mode]) <= 0.05, (after, alone.accuracy)


def processes_of(launcher: subprocess.Popen[str]) -> dict[str, list[psutil.Process]]:
    """The processes of a run by their part in it; those of a part in the order of their ranks."""
    found: dict[str, list[psutil.Process]] = {part: [] for part in PARTS}
    found["launcher"] = [psutil.Process(launcher.pid)]
    for rank in sorted(
        psutil.Process(launcher.pid).children(), key=lambda p: int(p.environ().get("RANK", -1))
    ):
        found["rank"].append(rank)
        for child in rank.children():
            command = child.cmdline()
            if serve.__name__ in command:
                found["engine"].append(child)
            elif "serve-teacher" in command:
                found["service"].append(child)
    return found


@pytest.mark.timeout(2400)
def test_a_run_is_resumed_to_the_same_rows_whatever_part_of_it_is_killed(
    small: Any, torchrun: Callable[..., Any], records: Any, tmp_path: Path
) -> None:
    whole, torn = small.copy("undisturbed"), small.copy("killed")
    options = [part for assignment in SMALL for part in ("--set", assignment)]
    said = tmp_path / "said"
    assert torchrun(whole, said, *options).wait(300) == 0, said.read_text()[-3000:]
    for part, number in KILLS:
        before = len(records(torn))  # the run that was killed may have gone on for some steps
        launcher = torchrun(torn, said, *options)
        eventually(
            lambda before=before, launcher=launcher: (
                len(records(torn)) > before or launcher.poll() is not None
            ),
            300,
            f"a step after the {before} before is on record, for the {part} to be killed",
        )
        running = processes_of(launcher)
        assert [len(running[kind]) for kind in PARTS] == [2, 2, 2, 1], said.read_text()[-3000:]
        running[part][number].kill()
        assert launcher.wait(120) != 0
        _, left = psutil.wait_procs([p for kind in PARTS for p in running[kind]], timeout=60)
        assert not left, f"left running after the {part} was killed: {left}"
        assert len(records(torn)) < STEPS
    assert torchrun(torn, said, *options).wait(300) == 0, said.read_text()[-3000:]
    for one, other in zip(records(torn), records(whole), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(OF_THIS_MACHINE)} == {
            k: v for k, v in other.items() if not k.startswith(OF_THIS_MACHINE)
        }
    for name in ("samples.jsonl", "final/model.safetensors"):
        assert (torn / "train" / name).read_bytes() == (whole / "train" / name).read_bytes(), name
