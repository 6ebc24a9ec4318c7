"""The student's engine beside the trainer: it has the trainer's weights after each refresh, rests, is compared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from beside_engine import BesideEngine

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.child.weights import ALLOCATOR_SETTINGS
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model
from tropd.pipeline.run.opening import LoadedModel
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.rollout import sampler
from tropd.pipeline.training.rollout.engine_check import check_engine
from tropd.pipeline.training.rollout.sampler import Rolling, rollout_engine
from tropd.pipeline.training.world import World
from tropd.storage.errors import TropdError

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_runs import make_models, make_run

SUPPORT = str(Path(sys.modules[BesideEngine.__module__].__file__ or "").parent)
PROMPTS = [[3, 4, 5], [6, 7]]
ASKED: dict[str, Any] = {"seeds": [0, 1], "max_tokens": [9, 12]}


class Said(SimpleNamespace):
    def waiting(self, description: str) -> Any:
        return ExitStack()

    def info(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_models(tmp_path_factory.mktemp("models") / "student")
    model = load_model(folder, dtype="float32", device=torch.device("cpu"), trust_remote_code=False)
    return LoadedModel(folder, model, None, frozenset([1]))


@pytest.fixture(scope="module")
def run(student: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("run") / "workspace", student.folder)
    text = run.workspace.config_path.read_text().replace("[student]", "[student]\nengine = 'vllm'")
    return replace(run, resolved=parse_config(text), reporter=cast(Any, Said(lines=[])))


@pytest.fixture(scope="module")
def rolling(run: Run, student: LoadedModel) -> Iterator[Rolling]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", SUPPORT)
        patch.setattr(sampler, "vllm_builder", lambda *_, **__: partial(BesideEngine, student.folder))
        yield rollout_engine(run, stack, student, student.model, student.folder, None, World(rank=3))


def change(student: LoadedModel, factor: float) -> None:
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(factor)


def test_after_each_refresh_it_samples_with_the_trainers_weights(
    rolling: Rolling, student: LoadedModel, run: Run
) -> None:
    here = TransformersEngine(student.model, [1], batch_size=4)
    seen = []
    for _ in range(3):
        rolling.refresh()
        found = rolling.engine.generate(PROMPTS, Sampling(), **ASKED)
        assert found == here.generate(PROMPTS, Sampling(), **ASKED)
        seen.append(found)
        rolling.rest()
        with pytest.raises(TropdError, match="asleep"):
            rolling.engine.generate(PROMPTS, Sampling(), **ASKED)
        change(student, 1.2)
    assert seen[0] != seen[1] != seen[2]
    assert (run.workspace.logs / "student-engine-3.log").exists()
    assert cast(Any, run.reporter).lines == []


def test_old_weights_are_found_and_new_ones_pass(rolling: Rolling, student: LoadedModel, run: Run) -> None:
    rolling.refresh()
    rows = [SimpleNamespace(sequence=[3, 4, 5, 6, 7], context=[3, 4], tokens=[5, 6, 7])]
    assert rolling.checked is not None
    session = cast(Any, SimpleNamespace(run=run, rolling=rolling, ahead=True))

    def check() -> None:
        here = TransformersEngine(student.model, [1]).score([row.sequence for row in rows], [2])
        outcome = SimpleNamespace(student_logprobs=np.concatenate([one.token_logprobs for one in here]))
        check_engine(session, 1, cast(Any, SimpleNamespace(rows=rows)), cast(Any, outcome))

    check()
    change(student, 1.5)
    with pytest.raises(TropdError, match="differ from the trainer's by"):
        check()
    rolling.refresh()
    check()


def test_the_engine_of_a_rank_is_no_rank_and_sees_its_gpu(
    run: Run, student: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}

    class Beside(SimpleNamespace):
        sleeps, choose = True, None

        def __init__(self, *_: Any, **options: Any) -> None:
            environment.update(options["environment"])

        def rest(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(sampler, "EngineProcess", Beside)
    monkeypatch.setattr(sampler, "vllm_builder", lambda *_, **__: None)
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**rank, "CUDA_VISIBLE_DEVICES": "5,7"}.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        rollout_engine(run, stack, student, student.model, student.folder, None, World(rank=1, size=2))
    assert not rank.keys() & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == "7"


def test_one_that_samples_while_the_student_trains_stays_awake(
    run: Run, student: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Beside(SimpleNamespace):
        sleeps, choose = False, None

        def __init__(self, *_: Any, **options: Any) -> None:
            asked.append(options["deadlines"].update.setting)

        def rest(self) -> None:
            asked.append("rest")

        def close(self) -> None:
            asked.append("close")

    monkeypatch.setattr(sampler, "EngineProcess", Beside)
    monkeypatch.setattr(sampler, "vllm_builder", lambda *_, **__: None)
    for staleness, expected in (
        (0, ["vllm.update_seconds", "rest", "close"]),
        (1, ["vllm.update_seconds", "close"]),
    ):
        asked.clear()
        said = Said(lines=[])
        text = run.workspace.config_path.read_text().replace("[student]", "[student]\nengine = 'vllm'")
        own = replace(
            run,
            resolved=parse_config(f"{text}\n[train]\nmax_staleness = {staleness}\n"),
            reporter=cast(Any, said),
        )
        with ExitStack() as stack:
            rollout_engine(own, stack, student, student.model, student.folder, None, World()).rest()
        assert asked == expected
        assert "cannot sleep on a CPU" in said.lines[0]


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_weights_on_a_gpu_go_over_as_handles_unless_its_memory_is_in_expandable_segments(
    variable: str | None, run: Run, student: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def beside(*_: Any, **options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(sleeps=True, choose=None, close=lambda: None)

    monkeypatch.setattr(sampler, "EngineProcess", beside)
    monkeypatch.setattr(sampler, "vllm_builder", lambda *_, **__: None)
    monkeypatch.setattr(sampler, "merged_state", lambda model: {})
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "expandable_segments:True")
    whole = SimpleNamespace(device=torch.device("cuda", 3))
    with ExitStack() as stack:
        rollout_engine(run, stack, student, whole, student.folder, None, World())
    assert asked["as_handles"] == (variable is None)
    assert not set(ALLOCATOR_SETTINGS) & set(asked["environment"])
