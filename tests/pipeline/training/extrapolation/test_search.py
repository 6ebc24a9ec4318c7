"""The search for better weights along a line: what is accepted and undone, its records, resumption to the same bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_here import TeacherHere, asked_here, teacher_of
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.objectives.extrapolation.settings import Extrapolation
from tropd.pipeline.run.interrupt import StopRequestedError
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.extrapolation.base_weights import BaseWeights
from tropd.pipeline.training.extrapolation.search import is_due, search
from tropd.pipeline.training.loop import train
from tropd.storage.errors import FingerprintMismatchError, InterruptedStageError, TropdError


def line(model: Any) -> tuple[BaseWeights, Callable[[], float], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Base weights, a matrix of the student as it is, and as it was at base and after an update."""
    model = copy.deepcopy(model)
    base = BaseWeights(model, Extrapolation().parameters)
    matrix = model.model.layers[0].mlp.down_proj.weight
    start = matrix.detach().numpy().astype(np.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return base, lambda: matrix.detach().numpy().copy(), start, matrix.detach().numpy().astype(np.float64)


def test_steps_are_powers_of_two() -> None:
    assert [done for done in range(70) if is_due(done)] == [1, 2, 4, 8, 16, 32, 64]


def test_attempts_are_equal_steps_along_one_line(tiny_model: Any) -> None:
    base, now, start, theta = line(tiny_model)
    seen = []

    def score() -> float:
        seen.append(now())
        return float(len(seen))

    found = search(base, Extrapolation(), score)
    assert (found.before, found.tried, found.accepted) == (1.0, [2.0, 3.0, 4.0, 5.0, 6.0], 5)
    assert (found.after, found.factor) == (6.0, pytest.approx(11.0))
    for lengths, weights in zip((1, 3, 5, 7, 9, 11), seen, strict=True):
        np.testing.assert_allclose(weights, start + lengths * (theta - start), rtol=1e-5, atol=1e-6)
    (kept,) = (v for n, v in base.tensors().items() if n.endswith("layers.0.mlp.down_proj.weight"))
    np.testing.assert_array_equal(kept.numpy(), now())


@pytest.mark.parametrize("last", [2.0, 1.5, float("nan")])
def test_the_first_that_is_no_better_is_undone_to_the_bit_and_ends_it(tiny_model: Any, last: float) -> None:
    base, now, *_ = line(tiny_model)
    scores, seen = iter([1.0, 2.0, last]), []

    def score() -> float:
        seen.append(now())
        return next(scores)

    found = search(base, Extrapolation(), score)
    assert (len(found.tried), found.accepted, found.after, found.factor) == (2, 1, 2.0, 3.0)
    np.testing.assert_array_equal(now(), seen[1])
    (kept,) = (v for n, v in base.tensors().items() if n.endswith("layers.0.mlp.down_proj.weight"))
    np.testing.assert_array_equal(kept.numpy(), now())


def test_a_score_that_does_not_rise_leaves_the_update_as_it_is(tiny_model: Any) -> None:
    base, now, _, theta = line(tiny_model)
    found = search(base, Extrapolation(), lambda: 0.5)
    assert (found.accepted, found.after, found.factor, found.tried) == (0, 0.5, 1.0, [0.5])
    np.testing.assert_array_equal(now(), theta.astype(np.float32))


# ------------------------------------------------------------------------------------- whole runs

SETTINGS = """
extrapolation = {{ score = "{score}", most = 4 }}
[train]
steps = 5
learning_rate = 1e-3
checkpoint_every = 1
"""


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture
def make(tmp_path: Path, tiny_models: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    asked_here(monkeypatch, lambda *_, **__: {"": teacher_of(teacher_folder)})

    def made(name: str, score: str = "reverse_kl", *assignments: str) -> Run:
        run = make_run(tmp_path / name, tiny_models, extra=SETTINGS.format(score=score))
        text = run.workspace.config_path.read_text().replace('"tropd"', '"effopd"')
        text = text.replace("[rollout]", "[rollout]\nprompts_per_step = 4\nsamples_per_prompt = 1")
        text = text.replace(str(tiny_models), str(teacher_folder), 1)
        return replace(run, resolved=parse_config(text, assignments, where="config.toml"))

    return made


def records(run: Run) -> list[dict[str, Any]]:
    lines = (run.workspace.stage("train") / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith(("time_", "memory_", "checksum"))} for r in found]


def weights(run: Run) -> bytes:
    return (run.workspace.stage("train") / "final" / "model.safetensors").read_bytes()


class Dying:
    """In place of ``BaseWeights.follow``: fails at its n-th call."""

    def __init__(self, calls: int) -> None:
        self._left = calls
        self._original = BaseWeights.follow

    def __get__(self, owner: BaseWeights, _: type | None = None) -> Callable[[], None]:
        def follow() -> None:
            self._left -= 1
            if not self._left:
                raise TropdError("here")
            self._original(owner)

        return follow


def test_a_run_that_ends_anywhere_goes_on_to_the_same_bits(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, ended = make("undisturbed"), make("ended")
    train(undisturbed)
    expected = records(undisturbed)
    found = [r for r in expected if "extrapolation_score" in r]
    assert [r["step"] for r in found] == [0, 1, 3]
    # Something was accepted, something undone: both have to survive.
    assert sum(r["extrapolation_accepted"] for r in found) > 0
    assert any(len(r["extrapolation_scores_tried"]) > r["extrapolation_accepted"] for r in found)
    assert all(r["extrapolation_score_after"] >= r["extrapolation_score"] for r in found)

    # Each time in the middle of the extrapolation: the weights are no step's then.
    for searches in (1, 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(BaseWeights, "follow", Dying(searches))
            with pytest.raises(TropdError, match="here"):
                train(ended)
    train(ended)
    assert records(ended) == expected
    assert weights(ended) == weights(undisturbed)


def test_accuracies_decide_where_there_are_answers(make: Any) -> None:
    run = make("run", "accuracy", "train.steps=1")
    train(run)
    (record,) = records(run)
    assert record["extrapolation_score"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert record["extrapolation_factor"] == pytest.approx(1 + 2 * record["extrapolation_accepted"])


def test_what_the_scores_depend_on_cannot_change_within_a_run(make: Any) -> None:
    run = make("run", "accuracy", "train.steps=1")
    train(run)
    path = run.workspace.root / "data" / "eval.jsonl"
    path.write_text(path.read_text().replace('"answer": "2"', '"answer": "3"'))
    with pytest.raises(FingerprintMismatchError, match=r"validation\.data\.evaluation"):
        train(run)
    with pytest.raises(FingerprintMismatchError, match=r"objective\.extrapolation\.most"):
        train(make("run", "accuracy", "train.steps=1", "objective.extrapolation.most=3"))


def test_a_stop_while_the_teacher_is_away_leaves_the_last_checkpoint(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, run = TeacherHere.score, make("run")

    def score(self: TeacherHere, request: Any) -> Any:
        saved = (run.workspace.stage("train") / "checkpoints" / "step-000003").exists()
        if saved and {sequence.seed for sequence in request.sequences} == {0}:
            raise StopRequestedError
        return original(self, request)

    monkeypatch.setattr(TeacherHere, "score", score)
    with pytest.raises(InterruptedStageError, match="step 4 of 5, while waiting for the teacher's judgment"):
        train(run)
    names = sorted(path.name for path in (run.workspace.stage("train") / "checkpoints").iterdir())
    assert names[-1] == "step-000003"
