"""Children of a rank: no variable of torchrun reaches them, and each sees the GPU of its rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tropd.pipeline.run.processes.child_environment import become_child, child_environment, device_variables

TORCHRUN = Path(sys.executable).with_name("torchrun")
# As vLLM does: a group of its own, at an address of its own. Without torch, it says what would mislead it.
STAND_IN = """
import json, os, sys
foreign = sorted(n for n in os.environ if n.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_"))
                 or n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
print(json.dumps({"url": json.dumps([foreign, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["KEPT"]])}), flush=True)
sys.stdin.read()
"""
RANK = """
import os, sys
from pathlib import Path
from tropd.pipeline.teacher.local_service import LocalTeacher
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
with LocalTeacher([sys.executable, "-c", sys.argv[2]], folder / f"{rank}.log") as teacher:
    (folder / f"{rank}.json").write_text(teacher.wait())
"""
OWN_GROUP = """
import json, socket, sys
from datetime import timedelta
import torch.distributed as dist
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1,
                        timeout=timedelta(seconds=10))
print(json.dumps({"url": "met itself"}), flush=True)
sys.stdin.read()
"""


def under_torchrun(folder: Path, child: str) -> list[str]:
    """What the stand-in for a teacher said to each of two ranks."""
    rank = [sys.executable, "-c", RANK, str(folder), child]
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", *rank],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "5,7", "KEPT": "yes"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / f"{rank}.json").read_text() for rank in range(2)]


def test_a_teacher_of_a_rank_has_nothing_of_torchrun_and_its_rank_s_gpu(tmp_path: Path) -> None:
    found = [json.loads(text) for text in under_torchrun(tmp_path, STAND_IN)]
    assert found == [[[], "5", "yes"], [[], "7", "yes"]]


@pytest.mark.slowest
def test_a_teacher_of_a_rank_can_form_a_group_of_its_own(tmp_path: Path) -> None:
    assert under_torchrun(tmp_path, OWN_GROUP) == ["met itself"] * 2


@pytest.mark.parametrize(
    ("visible", "number", "seen"),
    [(None, 3, "3"), ("4,5,6", 1, "5"), ("GPU-a, GPU-b", 1, "GPU-b"), ("", 1, ""), ("6", 1, "6")],
)
def test_devices_are_counted_among_the_visible_ones(
    visible: str | None, number: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_variables(number) == {"CUDA_VISIBLE_DEVICES": seen}


def test_a_child_that_needs_several_gpus_sees_those_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = child_environment(one_device=False)
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "LOCAL_RANK" not in found


def test_a_process_of_multiprocessing_takes_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("CUDA_VISIBLE_DEVICES", "0,1")):
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    try:
        become_child(child_environment())
        assert "RANK" not in os.environ
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        assert os.environ["PATH"] == before["PATH"]
    finally:
        become_child(before)
