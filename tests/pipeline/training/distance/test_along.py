"""Evaluation during training: what is measured, that it changes nothing, and that it survives interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from teacher_here import TeacherHere, asked_here, teacher_of
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model
from tropd.pipeline.run.interrupt import StopRequestedError
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.distance import exact_distances
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.training import loop, setup
from tropd.pipeline.training.distance import held_out_set
from tropd.pipeline.training.loop import train

SETTINGS = """
[train]
steps = 3
learning_rate = 1e-2
evaluate_every = {every}
evaluate_problems = 5
[evaluation]
distance_prompts = 4
"""


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture
def make(tmp_path: Path, tiny_models: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs whose teacher answers without a service around it."""
    asked_here(monkeypatch, lambda *_, **__: {"": teacher_of(teacher_folder)})

    def made(name: str, *, every: int = 1, objective: str = "opd") -> Run:
        run = make_run(tmp_path / name, tiny_models, extra=SETTINGS.format(every=every))
        text = run.workspace.config_path.read_text().replace('"tropd"', f'"{objective}"')
        text = text.replace(str(tiny_models), str(teacher_folder), 1)
        text = text.replace("[rollout]", "[rollout]\nprompts_per_step = 4")
        run = replace(run, resolved=parse_config(text, where="config.toml"))
        generate_prefixes(run)
        return run

    return made


def records(run: Run) -> list[dict[str, Any]]:
    path = run.workspace.stage("train") / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Run) -> bytes:
    return (run.workspace.stage("train") / "final" / "model.safetensors").read_bytes()


def test_it_changes_nothing_of_training(make: Any) -> None:
    runs = [make("with", every=1), make("without", every=0)]
    for run in runs:
        train(run)
    assert weights(runs[0]) == weights(runs[1])
    added = {"distance_", "accuracy_"}
    for one, other in zip(*map(records, runs), strict=True):
        assert {name for name in one.keys() - other.keys() if not name.startswith(tuple(added))} == set()
        same = [n for n in other if not n.startswith(("time_", "memory_")) and n != "checksum"]
        assert [one[name] for name in same] == [other[name] for name in same]


def test_records_are_those_of_the_student_as_it_is(make: Any, teacher_folder: Path) -> None:
    run = make("run", every=3)
    train(run)
    first, _, last = records(run)
    assert not [name for name in first if name.startswith("distance_")]
    assert (last["accuracy_problems"], last["distance_prompts"]) == (5, 4)
    cpu = torch.device("cpu")
    student, teacher = (
        TransformersEngine(load_model(folder, dtype="float32", device=cpu), [1])
        for folder in (run.workspace.stage("train") / "final", teacher_folder)
    )
    (path,) = (run.workspace.root / held_out_set.FOLDER).iterdir()
    written = pq.read_table(path).to_pylist()
    sequences = [[*one["prompt_tokens"], *one["tokens"]] for one in written]
    starts = [len(one["prompt_tokens"]) for one in written]
    exact = np.concatenate(
        [d.kl for d in exact_distances(teacher, student, sequences, starts, batch_tokens=64)]
    )
    assert (
        0.3 * exact.mean() < last["distance_forward_kl"] <= exact.mean() + 1e-4
    )  # of five alternatives and the rest
    assert last["distance_teacher_length"] == np.mean([len(one["tokens"]) for one in written])
    assert 0 < last["distance_acceptance"] < 1
    assert 1 <= last["distance_length"] <= 12


def test_problems_are_spread_over_the_file(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = setup.open_session
    seen = []

    def look(*given: Any) -> Any:
        seen.append(opened(*given))
        return seen[-1]

    monkeypatch.setattr(loop, "open_session", look)
    train(make("run", every=3))
    assert [p.id for p in seen[0].problems.prompts] == ["p0", "p2", "p4", "p6", "p8"]
    assert [p.id for p in seen[0].held_out.prompts.prompts] == ["p0", "p2", "p5", "p7"]


def test_the_teacher_writes_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("run")
    train(run)
    before = records(run)
    monkeypatch.setattr(held_out_set, "sample_responses", None)
    train(run, force=True)
    measured = ("distance_forward_kl", "distance_reverse_kl", "distance_acceptance", "distance_length")
    assert [[r[name] for name in measured] for r in before] == [
        [r[name] for name in measured] for r in records(run)
    ]
    monkeypatch.undo()


def test_a_damaged_file_of_responses_is_made_again(make: Any) -> None:
    run = make("run")
    train(run)
    (path,) = (run.workspace.root / held_out_set.FOLDER).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    train(run, force=True)
    assert path.read_bytes() == whole


def test_without_a_service_there_is_the_forward_kl(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("run", objective="sft")
    train(run)
    for record in records(run):
        assert record["distance_forward_kl"] > 0
        assert "distance_reverse_kl" not in record


def test_a_stop_while_the_teacher_is_away_costs_no_step(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TeacherHere.score

    def score(self: TeacherHere, request: Any) -> Any:
        if len(request.sequences) == 4 and request.topk == "none" and request.sequences[0].seed == 0:
            raise StopRequestedError
        return original(self, request)

    monkeypatch.setattr(TeacherHere, "score", score)
    run = make("run")
    train(run)
    assert len(records(run)) == 3
    assert all("distance_reverse_kl" not in r and r["distance_forward_kl"] > 0 for r in records(run))


def test_neither_answers_nor_distances_are_needed(make: Any) -> None:
    run = make("run")
    path = run.workspace.root / "data" / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(6)))
    train(replace(run, reporter=SILENT))
    last = records(run)[-1]
    assert last["distance_reverse_kl"] is not None
    assert not [name for name in last if name.startswith("accuracy")]
