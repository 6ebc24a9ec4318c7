"""A run is planned from small files alone, and training is refused where even short responses do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import Listening
from paper_node import NODE, STUDENT, TEACHER
from tiny_runs import make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models import directories
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.training import loop
from tropd.pipeline.training.preflight import preflight
from tropd.pipeline.training.preflight.machine import look_at_machine
from tropd.pipeline.training.preflight.preflight import gathers_once, plan_run, require_room, runs_on_cpu
from tropd.storage.errors import ConfigError

ON_THE_HUB = (
    '[student]\nmodel = "some/student"\n[teacher]\nmodel = "some/teacher"\n[objective]\nname = "opd"\n'
)


def of_hub_models(run: Run) -> Run:
    return replace(run, resolved=parse_config(ON_THE_HUB))


def test_a_plan_of_hub_models_asks_for_small_files_only(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:  # a look at the cache
            raise ValueError("not here")
        asked.append(allow_patterns)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    planned = plan_run(of_hub_models(tiny_run), 8, machine=NODE)
    assert asked
    assert all(patterns == directories.DESCRIPTION_PATTERNS for patterns in asked)
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    assert planned.needs is None
    (check,) = planned.checks
    assert check.holds is None
    assert "student.model = 'some/student'" in check.what
    assert "memory, disk and time were not checked" in check.what
    known = plan_run(of_hub_models(tiny_run), 8, machine=NODE, sizes=(STUDENT, TEACHER))
    assert known.needs is not None
    assert known.needs.student == STUDENT
    assert [c.what.endswith("sizes are those of the table") for c in known.checks[:2]] == [True, True]
    assert known.step is not None


def test_a_plan_for_gpus_is_in_bfloat16_wherever_it_is_made(tiny_run: Run) -> None:
    run = of_hub_models(tiny_run)
    planned = plan_run(run, 8, machine=NODE, sizes=(STUDENT, TEACHER))
    assert planned.needs is not None
    config = planned.needs.config
    assert (config.runtime.device, config.student.dtype, config.teacher.dtype) == (
        "cuda",
        "bfloat16",
        "bfloat16",
    )
    assert runs_on_cpu(run, 1)
    assert not runs_on_cpu(run, 1, gpu_bytes=80e9)


def test_a_run_that_fits_is_let_through(tiny_run: Run) -> None:
    require_room(tiny_run, 1, 10)


def test_training_is_refused_where_it_cannot_fit(tiny_run: Run) -> None:
    small = replace(look_at_machine(tiny_run.workspace.root, gpus=False), memory=1e9)
    with pytest.raises(
        ConfigError, match=r"(?s)training cannot be made here:.*main memory: at most .* 1\.0 GB"
    ):
        require_room(tiny_run, 1, 10, machine=small)
    full = replace(small, memory=1e12, disk=1000.0)
    with pytest.raises(ConfigError, match=r"disk: at most .* needed"):
        require_room(tiny_run, 1, 10, machine=full)


def test_training_looks_before_it_opens_a_model(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    score_teacher(tiny_run, source_stage=generate_prefixes(tiny_run).stage)
    small = replace(look_at_machine(tiny_run.workspace.root, gpus=False), memory=1e9)
    monkeypatch.setattr(preflight, "look_at_machine", lambda *_, **__: small)
    monkeypatch.setattr(loop, "open_session", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(ConfigError, match="training cannot be made here"):
        loop.train(tiny_run)


def test_long_responses_that_would_not_fit_are_a_warning(tmp_path: Path, tiny_models: Path) -> None:
    run = make_run(tmp_path / "run", tiny_models)
    rollout = run.config.rollout.model_copy(update={"max_tokens": 1_000_000, "batch_size": 4096})
    config = run.config.model_copy(update={"rollout": rollout})
    said = Listening()
    run = replace(run, resolved=replace(run.resolved, config=config), reporter=said)
    require_room(run, 1, 10, machine=replace(look_at_machine(tmp_path, gpus=False), memory=4e9))
    (warning,) = said.warnings
    assert "if responses get as long as they may: main memory: at most" in warning
    assert "rollout.batch_size" in warning


def test_processes_on_a_cpu_share_its_memory(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    here = look_at_machine(tiny_run.workspace.root, gpus=False)

    def gathers(memory: float) -> bool:
        machine = replace(here, memory=memory)
        monkeypatch.setattr(preflight, "look_at_machine", lambda *_, **__: machine)
        return gathers_once(tiny_run, 2, 10)

    assert gathers(16e9)
    assert not gathers(1e9)


def test_checkpoints_that_are_there_do_not_need_room_again(tiny_run: Run) -> None:
    written = tiny_run.workspace.stage("train") / "checkpoints"
    written.mkdir(parents=True)
    (written / "one").write_bytes(bytes(1_000_000))
    require_room(tiny_run, 1, 10, machine=replace(look_at_machine(written, gpus=False), disk=1000.0))
