"""Which processes of a training run start a teacher's service, and whose service each of them asks."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_runs import make_run

from tropd.pipeline.config.resolve import load_config
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher import connect
from tropd.pipeline.teacher.connect import connect_teachers, start_teachers


class Service:
    """Stands for a local service: its address is its log's name."""

    def __init__(self, command: list[str], log: Path, *, one_device: bool) -> None:
        self.log, self.one_device = log, one_device

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None: ...


def with_settings(run: Run, *assignments: str) -> Run:
    return replace(run, resolved=load_config(run.workspace.config_path, assignments))


@pytest.mark.parametrize(
    ("settings", "logs"),
    [
        ((), ["teacher-service.log", "teacher-service-rank-1.log"]),
        (('teacher.placement="first"',), ["teacher-service.log", None]),
        (('teacher.engine="vllm"', "vllm.tensor_parallel_size=2"), ["teacher-service.log", None]),
        (('teacher.url="http://127.0.0.1:1"',), [None, None]),
    ],
)
def test_every_process_starts_its_own_unless_one_is_for_all(
    settings: tuple[str, ...],
    logs: list[str | None],
    tmp_path: Path,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect, "LocalTeacher", Service)
    run = with_settings(make_run(tmp_path / "run", tiny_models), *settings)
    found: list[str | None] = []
    for rank in range(2):
        with ExitStack() as stack:
            services: Any = start_teachers(run, stack, rank=rank)
            found.append(services[""].log.name if services else None)
    assert found == logs


def test_a_process_asks_its_own_service_and_else_that_of_the_first(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, Any]] = []

    def connect_one(run: Run, stack: ExitStack, *, started: Any, **_: Any) -> None:
        asked.append((run.config.teacher.url, started))

    monkeypatch.setattr(connect, "connect_teacher", connect_one)
    run = make_run(tmp_path / "run", tiny_models)
    own: Any = object()
    rest: dict[str, Any] = {
        "tokenizer": None,
        "stop_ids": (),
        "needed_length": 1,
        "on_wait": print,
        "sleep": print,
        "known": {"": "http://first"},
    }
    with ExitStack() as stack:
        connect_teachers(run, stack, started={"": own}, **rest)
        connect_teachers(run, stack, started={}, **rest)
    assert asked == [(None, own), ("http://first", None)]
