"""What cannot work on a machine is said before it starts, with numbers and the setting to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from paper_node import H100, NODE, TEACHER, paper_needs

from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.checks import (
    Check,
    check_machine,
    check_teacher_stages,
    check_training,
    refuse_plan,
)
from tropd.pipeline.training.preflight.machine import Gpu, Machine
from tropd.pipeline.training.preflight.needs import Needs
from tropd.storage.errors import ConfigError

NOWHERE = Machine(gpus=(), memory=16e9, shared_memory=64e6, disk=1e9)
IN_VLLM = "teacher.scoring_engine=vllm"


def everything(
    needs: Needs, machine: Machine = NODE, *, disk: float = 1e9, runs_here: bool = True
) -> list[Check]:
    return [
        *check_machine(needs, machine, disk=disk, runs_here=runs_here),
        *check_teacher_stages(needs, machine),
        *check_training(needs, machine),
    ]


def refused(checks: Sequence[Check]) -> str:
    return "\n".join(check.what for check in checks if check.holds is False)


def test_a_teacher_in_vllm_does_not_fit_beside_the_trainer() -> None:
    """vLLM takes 68 of 80 GB, whatever the size of the model; its weights alone would fit."""
    one = paper_needs(1, IN_VLLM, "student.engine=transformers", "vllm.gpu_memory_utilization=0.85")
    found = refused(check_training(one, NODE))
    assert "train: at most" in found
    assert "teacher in vLLM (68.0 GB): vllm.gpu_memory_utilization" in found
    assert not refused(check_training(paper_needs(8, IN_VLLM, 'teacher.url="http://node:1"'), NODE))


def test_the_pass_over_teacher_prefixes_counts_in_parts() -> None:
    rows = ("student.engine=transformers", "rollout.batch_size=64")
    guided, plain = (
        {
            part.name: part.bytes
            for part in paper_needs(8, *rows, f"objective.name={name}").training()["each GPU"]
        }
        for name in ("tropd", "opd")
    )
    name = "first pass of rollouts: prompts, teacher prefixes"
    # 16,384 of 530,944 tokens at once, which would take more than 40 GB.
    assert 1e9 < guided[name] < 2e9
    assert plain[name] < guided[name]


def test_keys_and_values_grow_by_doubling() -> None:
    parts = paper_needs(8, "student.engine=transformers", "rollout.batch_size=64").training()["each GPU"]
    (cache,) = [part for part in parts if part.name == "KV cache of rollouts"]
    # 8,296 columns are needed; 457 doubled five times are there.
    assert cache.bytes == 64 * 457 * 2**5 * 2 * 2 * 28 * 2 * 128


def test_each_gpu_has_a_teacher_or_the_first_one() -> None:
    every, first = (
        list(paper_needs(8, f"teacher.placement={where}").training()) for where in ("every", "first")
    )
    assert every == ["each GPU"]
    assert first == ["GPU 0", "each other GPU"]


def test_fewer_gpus_than_asked_for() -> None:
    two = replace(NODE, gpus=(H100,) * 2)
    found = refused(everything(paper_needs(8), two))
    assert "GPUs: 8 are needed, 2 visible (H100, H100); --gpus 2 takes these" in found
    planned = check_machine(paper_needs(8), two, disk=1e9, runs_here=False)
    assert [check.holds for check in planned if check.what.startswith("GPUs")] == [None]
    (used,) = [c for c in check_machine(paper_needs(1), NODE, disk=1e9, runs_here=True) if "GPUs" in c.what]
    assert "GPUs: 1 of 8 (H100); --gpus 8 uses all" in used.what


def test_a_gpu_that_another_process_fills() -> None:
    full = replace(NODE, gpus=(H100, replace(H100, free=9e9), *[H100] * 6))
    needs = paper_needs(8, "student.engine=transformers", "rollout.batch_size=16")
    checks = everything(needs, full)
    assert "on each GPU, 9.0 GB free" in refused(checks)
    assert not refused(everything(needs))
    assert any("GPU 1 (H100): other processes have 71.0 GB of 80.0 GB" in check.what for check in checks)


def test_a_teacher_too_large_for_one_gpu() -> None:
    large = ModelShape(70_000_000_000, 80, 8192, 28_672, 64, 8, 128, 128_256)
    found = refused(everything(replace(paper_needs(8), teacher=large)))
    assert "142 GB of weights and buffers in a share of" in found
    assert "vllm.tensor_parallel_size" in found
    assert "score-teacher: at most" in found
    four = replace(paper_needs(8, "vllm.tensor_parallel_size=4", IN_VLLM), teacher=large)
    assert not refused(check_teacher_stages(four, NODE))


def test_shared_memory_of_a_container() -> None:
    small = replace(NODE, shared_memory=64e6)
    found = refused(everything(paper_needs(8), small))
    assert "/dev/shm: 1.0 GB needed, 0.1 GB free; start the container with --shm-size=2g" in found
    ahead = paper_needs(8, "train.max_staleness=1", "student.engine=transformers")
    # The weights of eight sampling processes.
    assert "/dev/shm: 29.4 GB needed" in refused(everything(ahead, small))
    assert "train.max_staleness = 0" in refused(everything(ahead, small))
    beside = paper_needs(8, "student.engine=vllm")
    # Handles of GPU memory need none; where they are forbidden, each engine has the weights in bfloat16.
    assert "/dev/shm: 1.0 GB needed" in refused(everything(beside, small))
    assert "/dev/shm: 29.4 GB needed" in refused(everything(beside, replace(small, hands_over=False)))


def test_main_memory_of_all_ranks_and_disk() -> None:
    small = replace(NODE, memory=64e9)
    found = refused(everything(paper_needs(8), small, disk=5e12))
    assert "main memory: at most" in found
    assert "8 processes" in found
    assert "disk: at most 5,000 GB needed" in found
    assert "train.keep_checkpoints" in found


def test_another_machine_is_not_refused_for_this_one() -> None:
    checks = everything(
        paper_needs(8, "vllm.gpu_memory_utilization=0.5"), NOWHERE, disk=1e12, runs_here=False
    )
    about = [c for c in checks if c.what.startswith(("main", "/dev", "disk"))]
    assert [c.holds for c in about] == [None] * 3
    assert all("not the machine that is planned for" in check.what for check in about)


def test_a_deadline_shorter_than_the_work_on_a_request() -> None:
    """The largest request has 262,144 tokens, of which a GPU scores 24,000 a second."""
    url = 'teacher.url="http://node:8400"'
    found = refused(check_training(paper_needs(7, url, "teacher.timeout_seconds=15"), NODE))
    assert "teacher.timeout_seconds = 15: the largest request is predicted to take 11 s" in found
    assert "set it to 16 or more, or lower service.max_request_tokens" in found
    assert not refused(check_training(paper_needs(7, url), NODE))
    smaller = paper_needs(7, url, "teacher.timeout_seconds=15", "service.max_request_tokens=100000")
    assert not refused(check_training(smaller, NODE))
    slow = refused(check_training(paper_needs(8, "vllm.answer_seconds=50"), NODE))
    assert "vllm.answer_seconds = 50: the responses of a step are predicted within 46 s; set it to 70" in slow


def test_reading_a_teacher_takes_longer_than_it_may() -> None:
    huge = replace(TEACHER, parameters=400_000_000_000)
    found = refused(check_training(replace(paper_needs(8), teacher=huge), NODE))
    assert "reading it takes about 800 s; start it before, with tropd serve-teacher" in found


def test_a_refusal_has_all_reasons_at_once() -> None:
    checks = [Check(True, "fine"), Check(False, "first"), Check(None, "unknown"), Check(False, "second")]
    with pytest.raises(ConfigError, match=r"(?s)training cannot be made here:\n    first\n    second"):
        refuse_plan(checks, "training")
    refuse_plan(checks[:1], "training")


def test_gpus_of_several_machines_are_counted_on_each() -> None:
    needs = paper_needs(16, machines=2)
    assert needs.here == 8
    assert not refused(check_machine(needs, NODE, disk=1e9, runs_here=True))
    assert isinstance(NODE.gpus[0], Gpu)
