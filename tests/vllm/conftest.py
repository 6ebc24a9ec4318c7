"""Workspaces that several tests with a real vLLM go on from, and runs of many processes on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import dump_config, parse_config
from tropd.storage.workspace import Workspace

BIN = Path(sys.executable).parent
BOTH = ("--set", "teacher.engine=vllm", "--set", "student.engine=vllm")


def run_stage(stage: str, workspace: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [BIN / "tropd", stage, "-w", workspace, *options, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Demo:
    """The demo with the prefixes that transformers made, before training."""

    folder: Path
    kept: float
    """Share of the teacher's responses that are prefixes."""
    copy: Callable[[str], Path]
    """A copy of it under a name."""


@pytest.fixture(scope="session")
def stage() -> Callable[..., dict[str, Any]]:
    """Run a stage; returns what it prints as JSON."""
    return run_stage


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    base = tmp_path_factory.mktemp("demo")
    original = base / "prepared"
    subprocess.run([BIN / "tropd", "init", original, "--recipe", "demo"], check=True)
    run_stage("prepare", original)
    kept = run_stage("generate-prefixes", original)["kept_fraction"]
    return Demo(original, kept, lambda name: Path(shutil.copytree(original, base / name)))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Barely trained models and few prompts: enough where only the same rows are asked for."""
    base = tmp_path_factory.mktemp("small")
    original = base / "prepared"
    sizes = (
        "demo.teacher_steps=60",
        "demo.student_steps=20",
        "demo.train_problems=80",
        "demo.eval_problems=20",
    )
    config = parse_config(recipe_text("demo"), (*sizes, "prefixes.keep=all")).config
    Workspace.create(original).config_path.write_text(dump_config(config))
    run_stage("prepare", original)
    kept = run_stage("generate-prefixes", original)["kept_fraction"]
    return Demo(original, kept, lambda name: Path(shutil.copytree(original, base / name)))


@dataclass(frozen=True)
class Trained:
    """The demo after training on vLLM in one process."""

    workspace: Path
    accuracy: dict[str, Any]
    """As ``tropd evaluate`` prints it."""


@pytest.fixture(scope="session")
def alone(demo: Demo) -> Trained:
    workspace = demo.copy("vllm")
    for name in ("score-teacher", "train"):
        run_stage(name, workspace, *BOTH)
    return Trained(workspace, run_stage("evaluate", workspace, *BOTH)["accuracy"])


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.Popen[str]]:
    """Start ``tropd train`` in two processes; what they say goes into the file ``said``."""

    def start(workspace: Path, said: Path, *options: str) -> subprocess.Popen[str]:
        command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", BIN / "tropd"]
        with said.open("a") as stream:
            return subprocess.Popen(
                [*map(str, command), "train", "-w", str(workspace), "--set", "student.engine=vllm", *options],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
            )

    return start


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """The metrics of a workspace by step, as far as they are written."""

    def read(workspace: Path) -> list[dict[str, Any]]:
        path = workspace / "train" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    return read
