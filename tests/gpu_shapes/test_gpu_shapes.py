"""Training, scoring and decoding on tensors of a GPU: the CPU's results, no operation on two devices, few waits.

Where PyTorch sees a GPU, that is used, and waits are not counted. Elsewhere the device is pretended, which takes a C++
compiler and a process of its own; what that cannot see is said in ``pretend_cuda``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from pretend_cuda import library

from tropd.pipeline.config.recipe_files import recipe_names

PROJECT = Path(__file__).parents[2]
# Each kind of loss, and each way to run a model.
QUICK = (
    "step tropd",
    "step tropd-cached",
    "step tip",
    "step tropd bfloat16",
    "step padded",
    "step checkpointed",
    "step padded vocabulary",
    *(["step adapters"] if find_spec("peft") else []),
    "chunks",
    "chunks tail",
    "chunks bfloat16",
    "score chosen",
    "score bfloat16",
    "generate with stops",
    "generate a batch and one row",
    "generate graphs",
)
SLOW = (
    *(f"step {name}" for name in recipe_names("objectives") if name != "sft" and f"step {name}" not in QUICK),
    "step vopd bfloat16",
    "step sharded",
    "score",
    "score padded vocabulary",
    "generate",
    "generate greedy",
    "generate nucleus",
    "generate equal prompts",
    "generate graphs bfloat16",
    "generate padded vocabulary",
)
# Shares of the largest number. In bfloat16, products on the CPU have other sums.
FLOAT32, BFLOAT16 = 2e-4, 3e-2
# Waits of the host: per pass of the student over a micro-batch, per scoring pass, per 16 tokens of a batch, and per loss.
# Two of a step's are for its numbers; one of each pass is transformers', which looks whether rows are packed.
MOST_WAITS = {"step": 2, "score": 2, "generate": 1, "chunks": 0}
# Of rows that are not packed, transformers looks twice at the padding.
EXCEPTIONS = {"step padded": 3}

Found = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a case found, from one process for all that are quick, and one for all others."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def ask(name: str) -> dict[str, Any]:
        names = QUICK if name in QUICK else SLOW
        out = folder / f"gpu-shapes-{'quick' if name in QUICK else 'slow'}.json"
        with FileLock(f"{out}.lock"):
            if not out.exists():
                _run(out, names)
        result: dict[str, Any] = json.loads(out.read_text())[name]
        assert "error" not in result, result["error"]
        return result

    return ask


def _run(out: Path, names: tuple[str, ...]) -> None:
    device = "cuda"
    if not torch.cuda.is_available():
        if library.compiler() is None:
            pytest.skip("a pretended GPU takes a C++ compiler: install g++")
        device = str(library.build(PROJECT / "build" / "pretend_cuda"))
    command = [sys.executable, str(Path(__file__).with_name("child.py")), str(out), device, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def check(result: dict[str, Any], name: str) -> None:
    most = BFLOAT16 if "bfloat16" in name else FLOAT32
    far = {what: value for what, value in result["differences"].items() if not value <= most}
    assert not far
    waits = sum(result["waits"].values())
    allowed = EXCEPTIONS.get(name, MOST_WAITS[name.split()[0]])
    assert waits <= allowed * result["per"], result["waits"]


@pytest.mark.parametrize("name", QUICK)
def test_a_gpu_gives_the_numbers_of_the_cpu_and_is_seldom_waited_for(found: Found, name: str) -> None:
    check(found(name), name)


@pytest.mark.slowest
@pytest.mark.parametrize("name", SLOW)
def test_so_does_every_objective_and_every_way_of_sampling(found: Found, name: str) -> None:
    check(found(name), name)
