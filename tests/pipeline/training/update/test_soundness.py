"""A student that a step has ruined is told as such: not by the teacher, and not by a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listening import Listening
from teacher_here import asked_here, teacher_of
from tiny_runs import make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.training import loop
from tropd.pipeline.training.loop import train
from tropd.pipeline.training.setup import open_session
from tropd.storage.errors import TropdError
from tropd.storage.stage.manifest import read_manifest


def make(folder: Path, models: Path, objective: str, **settings: Any) -> Run:
    """A run whose settings need not be sensible."""
    run = make_run(folder, models)
    text = run.workspace.config_path.read_text().replace('"tropd"', f'"{objective}"')
    text = text.replace("[rollout]", "[rollout]\nprompts_per_step = 4")
    config = parse_config(text, where="config.toml").config
    trained = config.train.model_copy(update={"steps": 4, "checkpoint_every": 1} | settings)
    return replace(run, resolved=replace(run.resolved, config=config.model_copy(update={"train": trained})))


def checkpoints(run: Run) -> list[str]:
    manifest = read_manifest(run.workspace.stage("train"))
    assert manifest is not None
    return [name for name in manifest.shards if name.startswith("checkpoints/")]


def saved_batch(run: Run) -> Any:
    (path,) = run.workspace.stage("train").glob("non-finite-step-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("learning_rate", "problem"),
    [
        (1e9, r"step 0: its update left weights of up to 1e\+09"),
        (1e3, r"step 0: after its update the student gives its responses a mean log-prob of -"),
    ],
)
def test_an_absurd_step_is_never_in_a_checkpoint(
    tmp_path: Path, tiny_models: Path, learning_rate: float, problem: str
) -> None:
    run = make(tmp_path / "run", tiny_models, "sft", learning_rate=learning_rate)
    generate_prefixes(run)
    with pytest.raises(TropdError, match=problem) as told:
        train(run)
    assert f"now {learning_rate:g}" in str(told.value.hint)
    assert checkpoints(run) == []
    assert saved_batch(run)["step"] == 0


def spoil(monkeypatch: pytest.MonkeyPatch, after: int, value: float) -> None:
    """Something goes wrong in the update of a step."""
    original, opened = loop.learning_rate_at, []

    def opening(*arguments: Any) -> Any:
        opened.append(open_session(*arguments))
        return opened[-1]

    def rate(config: Any, number: int) -> float:
        if number == after:
            spoiled = opened[-1].optimizer
            spoiled.register_step_post_hook(lambda *_: fill(opened[-1].parameters[0], value))
        return original(config, number)

    monkeypatch.setattr(loop, "open_session", opening)
    monkeypatch.setattr(loop, "learning_rate_at", rate)


def fill(parameter: torch.nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1).fill_(value)


def test_weights_that_are_not_finite_are_never_in_a_checkpoint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run", tiny_models, "sft", learning_rate=1e-3)
    generate_prefixes(run)
    spoil(monkeypatch, after=2, value=math.inf)
    with pytest.raises(TropdError, match=r"step 2: its update left weights that are not finite"):
        train(run)
    assert checkpoints(run) == ["checkpoints/step-000001", "checkpoints/step-000002"]
    assert saved_batch(run)["step"] == 2
    monkeypatch.undo()
    said, smaller = Listening(), run.config.train.model_copy(update={"micro_batch_tokens": 64})
    resolved = replace(run.resolved, config=run.config.model_copy(update={"train": smaller}))
    assert train(replace(run, reporter=said, resolved=resolved)).complete  # it goes on from there
    [warning] = said.warnings
    assert "train.micro_batch_tokens is 64 now, and was not set" in warning


def test_the_teacher_is_not_asked_about_log_probs_that_are_none(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run", tiny_models, "opd", learning_rate=1e-3, checkpoint_every=50)
    spoil(monkeypatch, after=0, value=math.nan)
    teacher = teacher_of(tiny_models)
    asked_here(monkeypatch, lambda *_, **__: {"": teacher})
    with pytest.raises(TropdError, match=r"step 1: the student's log-probs of its own tokens are not finite"):
        train(run)
    assert len(teacher.requests) == 1
    assert checkpoints(run) == []
    batch = saved_batch(run)
    assert (batch["step"], len(batch["rows"])) == (1, 16)


def test_every_update_is_made_at_the_scheduled_rate(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(
        tmp_path / "run", tiny_models, "sft", learning_rate=1e-3, schedule="linear", warmup_steps=2, steps=5
    )
    generate_prefixes(run)
    used: list[float] = []

    def opening(*arguments: Any) -> Any:
        opened = open_session(*arguments)
        opened.optimizer.register_step_pre_hook(
            lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
        )
        return opened

    monkeypatch.setattr(loop, "open_session", opening)
    train(run)
    assert used == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
