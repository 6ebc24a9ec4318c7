"""A run whose models are compiled, and one that cannot compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.engines.compiled import check_compiler
from tropd.pipeline.training.metrics import read_metrics
from tropd.storage.errors import ConfigError

COMPILED = ("--set", "runtime.compile=true")


def test_a_compiled_run_takes_the_same_steps(
    tropd: Any, prepared: Path, finished: Path, copy: Any, teacher_url: str
) -> None:
    try:
        check_compiler()
    except ConfigError as error:
        pytest.skip(f"no compiler here: {error}")
    workspace = copy(prepared)
    tropd.ok("train", "-w", workspace, "--set", f"teacher.url={teacher_url}", *COMPILED)
    found, expected = (read_metrics(w / "train" / "metrics.jsonl") for w in (workspace, finished))
    assert len(found) == len(expected)
    assert found[0]["tokens_on_policy"] == expected[0]["tokens_on_policy"]
    for one, other in zip(found[:3], expected, strict=False):
        for name in ("loss", "k1_mean", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=1e-4, rel=1e-3), (one["step"], name)


def test_gradients_by_region_are_refused(tropd: Any, prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    options = ["--set", f"teacher.url={teacher_url}", "--set", "train.region_gradients=true", *COMPILED]
    result = tropd("train", "-w", workspace, *options)
    assert result.code == 2
    assert "train.region_gradients and runtime.compile exclude each other" in result.output


def test_without_a_compiler_the_run_ends_before_it_begins(
    prepared: Path, copy: Any, teacher_url: str, tmp_path: Path
) -> None:
    workspace = copy(prepared)
    command = [Path(sys.executable).with_name("tropd"), "train", "-w", workspace, *COMPILED]
    done = subprocess.run(
        [*command, "--set", f"teacher.url={teacher_url}"],
        env=os.environ
        | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "runtime.compile is set, but PyTorch cannot compile here" in done.stderr
    assert "install a C++ compiler" in done.stderr
    assert not list((workspace / "train").glob("metrics.jsonl"))
