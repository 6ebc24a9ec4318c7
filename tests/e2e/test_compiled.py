"""Runs whose models cannot be compiled are refused before they begin; those that can are tested with the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILED = ("--set", "runtime.compile=true")


@pytest.mark.slowest
def test_gradients_by_region_are_refused(tropd: Any, prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    options = ["--set", f"teacher.url={teacher_url}", "--set", "train.region_gradients=true", *COMPILED]
    result = tropd("train", "-w", workspace, *options)
    assert result.code == 2
    assert "train.region_gradients and runtime.compile exclude each other" in result.output


@pytest.mark.slowest
def test_without_a_compiler_the_run_ends_before_it_begins(
    prepared: Path, copy: Any, teacher_url: str, tmp_path: Path
) -> None:
    workspace = copy(prepared)
    command = [Path(sys.executable).with_name("tropd"), "train", "-w", workspace, *COMPILED]
    done = subprocess.run(
        [*command, "--set", f"teacher.url={teacher_url}"],
        env={name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
        | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "runtime.compile is set, but PyTorch cannot compile here" in done.stderr
    assert "install a C++ compiler" in done.stderr
    assert not list((workspace / "train").glob("metrics.jsonl"))
