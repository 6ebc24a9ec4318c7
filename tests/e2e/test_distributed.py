"""Two processes under torchrun train as one does, stop together, and hand over to another number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from waiting import eventually

from tropd.pipeline.training.record.sharded_tensors import stored_tensors

BIN = Path(sys.executable).parent


def torchrun(workspace: Path, url: str, *more: str) -> subprocess.Popen[str]:
    command = [
        BIN / "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        BIN / "tropd",
        "train",
    ]
    options = ["-w", str(workspace), "--set", f"teacher.url={url}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(workspace: Path) -> list[dict[str, Any]]:
    path = workspace / "train" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slowest
def test_two_processes_are_as_good_as_one(
    tropd: Any, prepared: Path, finished: Path, copy: Any, teacher_url: str
) -> None:
    """They also attend within rows, where the one has masks."""
    workspace = copy(prepared)
    process = torchrun(workspace, teacher_url, "--set", "train.attention=varlen")
    eventually(
        lambda: len(records(workspace)) >= 3 or process.poll() is not None, 120, "three steps are on record"
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    steps = len(records(workspace))
    assert 3 <= steps < 8, output
    saved = workspace / "train" / "checkpoints" / f"step-{steps:06d}" / "tensors"
    assert [path.name[:11] for path in sorted(saved.glob("shard-*"))] == ["shard-00001", "shard-00002"], (
        output
    )
    tropd.ok("train", "-w", workspace, "--set", f"teacher.url={teacher_url}")
    found, expected = records(workspace), records(finished)
    assert [r["step"] for r in found] == list(range(8))
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        for name in ("tokens_on_policy", "teacher_tokens_scored", "teacher_topk_tokens"):
            assert one[name] == other[name]
    mine, theirs = (load_file(w / "train" / "final" / "model.safetensors") for w in (workspace, finished))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((mine[name] - value).abs().max()) < 5e-3, name


@pytest.mark.slowest
def test_two_processes_refuse_what_needs_one(prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    command = [
        BIN / "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        BIN / "tropd",
        "train",
    ]
    done = subprocess.run(
        [*map(str, command), "-w", str(workspace), "--set", "train.region_gradients=true"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert "train.region_gradients needs a single process" in done.stderr


@pytest.mark.slowest
def test_two_processes_train_adapters_as_one_does(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    adapters = ("--set", "student.lora={rank=4}")
    alone, both = copy(prepared, name="alone"), copy(prepared, name="both")
    tropd.ok("train", "-w", alone, "--set", f"teacher.url={teacher_url}", *adapters)
    process = torchrun(both, teacher_url, *adapters)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for one, other in zip(records(both), records(alone), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    saved = stored_tensors(both / "train" / "checkpoints" / "step-000008" / "tensors")
    assert {name.split(".")[0] for name in saved} == {"model", "optimizer"}
    assert all("lora_" in name for name in saved)
    mine, theirs = (load_file(w / "train" / "final" / "model.safetensors") for w in (both, alone))
    start = load_file(both / "models" / "student" / "model.safetensors")
    assert mine.keys() == theirs.keys() == start.keys()
    assert any(float((mine[name] - value).abs().max()) > 1e-4 for name, value in start.items())
    for name, value in theirs.items():
        assert float((mine[name] - value).abs().max()) < 5e-3, name
