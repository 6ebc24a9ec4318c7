"""A teacher elsewhere is asked over HTTP while rows are written: the same requests and weights as if afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models.engines.base import Generation
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.serve import load_service
from tropd.pipeline.training.loop import train
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import TropdError
from tropd.storage.formats.step_log import read_log

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "teacher"))

from running import running
from tiny_runs import make_run

STEPS, ROWS = 2, 8
OPTIONS = (
    'objective.name="opd"',
    f"train.steps={STEPS}",
    f"rollout.prompts_per_step={ROWS // 2}",
    "rollout.samples_per_prompt=2",
)


class Teacher:
    """Keeps what it is asked: the lengths of each request."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.asked: list[list[int]] = []
        self.arrived = threading.Event()
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def score(self, sequences: Any, starts: Any, **options: Any) -> Any:
        self.asked.append([len(tokens) for tokens in sequences])
        self.arrived.set()
        if self.fails:
            raise RuntimeError("out of order")
        return self._engine.score(sequences, starts, **options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[tuple[Teacher, str]]:
    run = make_run(tmp_path_factory.mktemp("service") / "run", tiny_models)
    engine, info = load_service(run)
    asked = Teacher(engine)
    with running(create_app(asked, info, run.config.service, None)) as url:
        yield asked, url


def trained(run: Run, url: str, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """Digest of the weights, and the metrics without times."""
    given = [*OPTIONS, f'teacher.url="{url}"', *options]
    text = run.workspace.config_path.read_text()
    train(replace(run, resolved=parse_config(text, given, where="config.toml")))
    folder = run.workspace.stage("train")
    records = read_log(folder / "metrics.jsonl").whole
    kept = [{k: v for k, v in one.items() if not k.startswith(("time_", "memory_"))} for one in records]
    return content_digest(folder / "final"), kept


def test_rows_are_asked_about_while_others_are_written_and_nothing_else_changes(
    tmp_path: Path, tiny_models: Path, teacher: tuple[Teacher, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, url = teacher
    generate = TransformersEngine.generate
    early = []

    def waits(self: Any, *given: Any, finished: Any = None, **options: Any) -> list[Generation]:
        """The first row that ends is asked about before the next one ends."""
        asked.arrived.clear()
        told = []

        def tell(number: int, one: Generation) -> None:
            told.append(number)
            finished(number, one)
            if len(told) == 1:
                early.append(asked.arrived.wait(20))

        return generate(self, *given, finished=tell, **options)

    def silent(self: Any, *given: Any, finished: Any = None, **options: Any) -> list[Generation]:
        return generate(self, *given, **options)

    found, requests = [], []
    for name, how in (("early", waits), ("late", silent)):
        monkeypatch.setattr(TransformersEngine, "generate", how)
        asked.asked.clear()
        # A row is a request: there is no room for two.
        found.append(trained(make_run(tmp_path / name, tiny_models), url, "service.batch_tokens=1"))
        requests.append(sorted(asked.asked))
    assert early == [True] * STEPS
    assert found[0] == found[1]
    assert requests[0] == requests[1]
    assert len(requests[0]) == STEPS * ROWS
    assert all(len(one) == 1 for one in requests[0])


def test_a_step_that_fits_into_a_pass_is_one_request(
    tmp_path: Path, tiny_models: Path, teacher: tuple[Teacher, str]
) -> None:
    asked, url = teacher
    asked.asked.clear()
    trained(make_run(tmp_path / "run", tiny_models), url)
    assert [len(one) for one in asked.asked] == [ROWS] * STEPS


def test_a_teacher_that_fails_while_rows_are_written_stops_the_run_as_ever(
    tmp_path: Path, tiny_models: Path, teacher: tuple[Teacher, str]
) -> None:
    asked, url = teacher
    asked.fails = True
    try:
        with pytest.raises(TropdError, match="scoring failed: RuntimeError"):
            trained(make_run(tmp_path / "run", tiny_models), url, "service.batch_tokens=1")
    finally:
        asked.fails = False
