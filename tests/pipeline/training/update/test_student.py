"""Two processes gather weights and reduce gradients once a step, with the gradients of one process."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tropd.pipeline.training.world import ALONE

CASES = Path(__file__).with_name("sharded_step.py")
SUPPORT = Path(__file__).parents[3] / "support"
UNITS = 3
"""Two layers, and everything else."""

pytestmark = pytest.mark.slowest


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of both processes."""
    folder = tmp_path_factory.mktemp("steps")
    processes = [
        subprocess.Popen(
            [sys.executable, str(CASES), str(rank), "2", str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def counts(folder: Path, name: str) -> dict[str, int]:
    """Of both processes, which do the same: one with fewer micro-batches idles along."""
    one, other = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2))
    idle = one.pop("idle", 0) + other.pop("idle", 0)
    assert one == other
    return {**one, "idle": idle}


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference, in parts of the largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in found) / largest


@pytest.mark.parametrize(("objective", "before"), [("tropd", 0), ("entropy-opd", 1)])
def test_gradients_are_reduced_once_a_step(objective: str, before: int, written: Path) -> None:
    once, each = (counts(written, f"{objective}-float32-{name}") for name in ("once", "each"))
    rounds = once["passes"] // (1 + before)
    assert rounds > 2
    assert each["passes"] == once["passes"] == rounds * (1 + before)
    # The last pass of the first objective, whose gradients are reduced, is an idle one in a process.
    assert once["idle"] == each["idle"] == (objective == "tropd")
    assert once["_reduce_scatter_base_"] == once["_allgather_base_"] == UNITS
    assert each["_reduce_scatter_base_"] == UNITS * rounds
    assert each["_allgather_base_"] > UNITS * rounds
    alone, _ = runpy.run_path(str(CASES))["step"](objective, "float32", ALONE, False)
    for rank in range(2):
        assert distance(load_file(written / f"{objective}-float32-once-{rank}.safetensors"), alone) < 1e-5


def test_gradients_of_lower_precision_are_added_up_in_float32(written: Path) -> None:
    """As where each micro-batch's are reduced in float32; sums in bfloat16 would be 1e-3 and more away."""
    once, each = (load_file(written / f"tropd-bfloat16-{name}-0.safetensors") for name in ("once", "each"))
    assert all(value.dtype == torch.float32 for value in once.values())
    assert distance(once, each) < 1e-5


@pytest.mark.parametrize("name", ["once", "each"])
def test_a_sharded_pass_is_proved_by_whole_weights_and_sharded_again(name: str, written: Path) -> None:
    for rank in range(2):
        found = json.loads((written / f"proof-{name}-{rank}.json").read_text())
        assert found["right"] == "proved"
        assert "Qwen3ForCausalLM: log-probs of scored tokens differ" in found["blind"]
        assert found["right, whole"] == found["blind, whole"] == 0
