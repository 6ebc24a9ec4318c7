"""Needs of a run: where its teacher is, what the student writes itself, and the parts of memory."""

from __future__ import annotations

import pytest
from paper_node import paper_needs

from tropd.pipeline.training.memory_plan import GATHERED, peak_bytes
from tropd.pipeline.training.preflight.needs import own_share


def test_a_cosine_of_prefixes_halves_what_the_student_writes() -> None:
    assert own_share(paper_needs(8).config) == 1.0
    assert own_share(paper_needs(8, "objective.name=tropd").config) == pytest.approx(0.5, abs=0.01)
    capped = paper_needs(8, "objective.name=tropd", "prefixes.max_tokens=4048")
    assert own_share(capped.config) == pytest.approx(0.75, abs=0.01)


def test_only_gpus_with_a_teacher_have_its_memory() -> None:
    parts = paper_needs(8, "student.engine=transformers", "teacher.placement=first").training()
    with_teacher, without = parts["GPU 0"], parts["each other GPU"]
    assert any(part.name == "teacher" for part in with_teacher)
    assert not any(part.name == "teacher" for part in without)
    served = paper_needs(8, 'teacher.url="http://node:8400"').training()
    assert list(served) == ["each GPU"]


def test_the_phases_of_a_step_do_not_add_up() -> None:
    parts = paper_needs(8, "student.engine=transformers").training()["each GPU"]
    assert peak_bytes(parts) < sum(part.bytes for part in parts)
    always = sum(part.bytes for part in parts if not part.phase)
    assert peak_bytes(parts) > always


def test_a_step_gathers_once_where_every_process_has_room() -> None:
    assert paper_needs(8).gathers_once
    assert not paper_needs(1).gathers_once
    # vLLM's share stays where the student writes while it trains.
    assert not paper_needs(8, "student.engine=vllm", "train.max_staleness=1").gathers_once
    placed = paper_needs(8, "student.engine=transformers", "teacher.placement=first", gpu_bytes=44e9)
    assert sum(any(p.name == GATHERED for p in parts) for parts in placed.training().values()) == 1
    assert not placed.gathers_once


def test_a_student_in_vllm_takes_its_share_while_it_writes() -> None:
    needs = paper_needs(8, "student.engine=vllm", "vllm.gpu_memory_utilization=0.5")
    (share,) = [part for part in needs.training()["each GPU"] if part.name == "student in vLLM"]
    assert (share.bytes, share.phase) == (40e9, "rollout")
    asleep = [part for part in needs.training()["each GPU"] if part.name == "vLLM of the student, asleep"]
    assert [part.phase for part in asleep] == ["score", "train"]
    assert all(1e9 < part.bytes < 3e9 for part in asleep)
    ahead = paper_needs(8, "student.engine=vllm", "train.max_staleness=1")
    (share,) = [part for part in ahead.training()["each GPU"] if part.name == "student in vLLM"]
    assert (share.bytes, share.phase) == (ahead.config.vllm.gpu_memory_utilization * 80e9, "")


def test_objectives_that_ask_nobody_need_no_teacher() -> None:
    needs = paper_needs(8, "objective.name=sft")
    assert not needs.asks
    assert needs.teachers == 0
    assert needs.step().teacher == 0
    assert list(needs.training()) == ["each GPU"]


def test_short_responses_need_less() -> None:
    needs = paper_needs(1, "objective.name=tropd", "student.engine=transformers")
    short = needs.with_short_responses()
    assert peak_bytes(short.training()["the GPU"]) < peak_bytes(needs.training()["the GPU"])
    assert short.config.prefix_max_tokens == short.config.rollout.max_tokens == 256
