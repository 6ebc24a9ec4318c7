"""The Python door: one run from arguments to page, resumed, refused, and shared with the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_models

from tropd.cli.commands.stages import train
from tropd.pipeline import Distillation, distill, open_run
from tropd.pipeline.experiments.api import stages_before_training
from tropd.pipeline.run.progress import SILENT, Steps
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import (
    ConfigError,
    DataError,
    FingerprintMismatchError,
    InterruptedStageError,
    TropdError,
)
from tropd.storage.workspace import Workspace

PROMPTS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)]
SETTINGS: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 1, "max_tokens": 8},
    "train": {"steps": 3, "learning_rate": 1e-3, "checkpoint_every": 1},
    "scores.k": 5,
    "objective.k": 5,
    "teacher.dtype": "float32",
    "student.dtype": "float32",
}


class Interrupting:
    """Presses Ctrl-C after the second training step, once."""

    def __init__(self) -> None:
        self.steps = 0
        self.messages: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(SILENT, name)

    def info(self, message: str) -> None:
        self.messages.append(message)

    @contextmanager
    def training(self, title: str, total: int, earlier: Any, settings: Any) -> Iterator[Steps]:
        yield self

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("api-models")
    return {role: make_models(folder / role, seed) for seed, role in enumerate(("teacher", "student"))}


def make(models: dict[str, Path], workspace: Path, **changes: Any) -> Distillation:
    arguments = {"prompts": PROMPTS, "evaluation": PROMPTS, "reporter": SILENT, **models, **SETTINGS}
    return distill(workspace=workspace, **{**arguments, **changes})


@pytest.fixture(scope="module")
def done(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that is trained, stopped once on the way, and evaluated."""
    workspace = tmp_path_factory.mktemp("api") / "run"
    run = make(models, workspace, reporter=Interrupting())
    with pytest.raises(TropdError):
        _ = run.student_path
    assert run.metrics.num_rows == 0
    with pytest.raises(InterruptedStageError):
        run.train()
    assert run.metrics.num_rows == 2
    assert make(models, workspace).train()["steps"] == 3
    assert set(make(models, workspace).evaluate()["accuracy"]) == {"before", "after", "teacher"}
    return workspace


def test_a_run_leaves_what_the_command_line_leaves(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(done, reporter=SILENT)
    metrics = run.metrics
    assert metrics["step"].to_pylist() == [0, 1, 2]
    assert metrics["loss"].null_count == 0
    assert run.student_path == done / "train" / "final"
    assert run.report().stat().st_size > 10_000
    assert repr(run) == f"Distillation({str(done)!r})"
    before = content_digest(run.student_path)
    train(done)  # the command
    assert "done before (3 steps), nothing to do" in capsys.readouterr().err
    assert content_digest(run.student_path) == before


def test_other_arguments_are_refused_by_the_stage_and_change_nothing(
    done: Path, models: dict[str, Path]
) -> None:
    before = content_digest(done / "train" / "final")
    with pytest.raises(FingerprintMismatchError, match=r"train\.steps: 3 → 4"):
        make(models, done, train={**SETTINGS["train"], "steps": 4}).train()
    with pytest.raises(DataError, match="prompts has other records"):
        make(models, done, prompts=PROMPTS[:5])
    listener = Interrupting()
    make(models, done, reporter=listener).train()
    assert any("done before (3 steps)" in message for message in listener.messages)
    assert content_digest(done / "train" / "final") == before


@pytest.mark.parametrize(
    ("objective", "recipe", "expected"),
    [
        ("opd", "", []),
        ("tropd", "", ["generate_prefixes"]),
        ("tropd-cached", "", ["generate_prefixes", "score_teacher"]),
        ("offline-opd", "", ["generate_rollouts", "score_teacher"]),
        ("opd", "[demo]\nenabled = true\n", ["generate_prefixes", "score_teacher"]),
    ],
)
def test_only_stages_that_the_objective_needs_come_before_training(
    tmp_path: Path, objective: str, recipe: str, expected: list[str]
) -> None:
    workspace = Workspace.create(tmp_path)
    workspace.config_path.write_text(f'{recipe}[objective]\nname = "{objective}"\n')
    stages = stages_before_training(open_run(tmp_path, reporter=SILENT).run)
    assert [stage.func.__name__ for stage in stages if isinstance(stage, partial)] == expected


def test_overrides_of_open_run_are_those_of_set(done: Path) -> None:
    run = open_run(done, reporter=SILENT, train={"steps": 5}, **{"rollout.temperature": 0.5})
    assert (run.run.config.train.steps, run.run.config.rollout.temperature) == (5, 0.5)
    assert run.run.assignments == ("train.steps=5", "rollout.temperature=0.5")
    with pytest.raises(ConfigError, match="unknown field"):
        open_run(done, reporter=SILENT, train={"stepz": 5})
    with pytest.raises(ConfigError, match="not a tropd workspace"):
        open_run(done / "train", reporter=SILENT)


def test_files_and_conversations(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    monkeypatch.chdir(tmp_path)
    config = make(models, tmp_path / "a", prompts="p.jsonl", evaluation=None).run.config
    assert config.data.prompts == str(tmp_path / "p.jsonl")
    assert not config.data.chat
    turns = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    assert make(models, tmp_path / "b", prompts=[turns]).run.config.data.chat
    assert config.teacher.model == str(models["teacher"])
    hub = make({**models, "teacher": "owner/name"}, tmp_path / "c")  # type: ignore[dict-item]
    assert hub.run.config.teacher.model == "owner/name"


def test_a_method_with_changes(models: dict[str, Path], tmp_path: Path) -> None:
    run = make(models, tmp_path, objective={"name": "opd", "reduction": "sequence_mean"})
    assert (run.run.config.objective.name, run.run.config.objective.reduction) == ("opd", "sequence_mean")


def test_bad_arguments_are_refused_before_anything_is_made(models: dict[str, Path], tmp_path: Path) -> None:
    class LoadedModel:
        pass

    workspace = tmp_path / "run"
    for changes, words in (
        ({"teacher": LoadedModel()}, "teacher is a LoadedModel"),
        ({"objective": "trop"}, "unknown objective"),
        ({"trian": {"steps": 3}}, "trian"),
        ({"train": {"steps": -3}}, "steps"),
        ({"prompts": []}, "prompts is empty"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            make(models, workspace, **changes)
        if "teacher" in changes:
            assert "save_pretrained" in str(caught.value.hint)
    assert not workspace.exists()


def test_a_workspace_that_people_have_edited_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    make(models, tmp_path)
    path = tmp_path / "config.toml"
    edited = "# mine\n" + path.read_text()
    path.write_text(edited)
    with pytest.raises(ConfigError, match="was not made by distill") as caught:
        make(models, tmp_path)
    assert "open_run" in str(caught.value.hint)
    assert path.read_text() == edited
    assert open_run(tmp_path, reporter=SILENT).run.config.train.steps == 3


def test_the_door_is_light_until_it_is_opened() -> None:
    code = (
        "import sys, tropd.pipeline; print([m for m in ('torch', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_progress_is_shown_where_nobody_is_named() -> None:
    from tropd.cli.render import make_reporter
    from tropd.pipeline.experiments.api import default_reporter

    assert type(default_reporter()) is type(make_reporter())
