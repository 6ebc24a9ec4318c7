"""Runs that go on with something else than they were begun with: finished ones stay, the others say what changes.

Here: training in bfloat16 that was begun before its rollouts were weighted, and settings that change rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import Listening

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run.run import Run
from tropd.pipeline.training import loop, train_stage
from tropd.pipeline.training.inputs import student_prompts
from tropd.pipeline.training.record.final_model import FINAL
from tropd.storage.errors import FingerprintMismatchError, TropdError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, describe_shard, write_manifest

CLIP = "train.importance_clip"


def opened(run: Run, *assignments: str) -> tuple[Run, Listening]:
    said, text = Listening(), run.workspace.config_path.read_text()
    given = ['objective.name="opd"', 'student.dtype="bfloat16"', *assignments]
    return replace(run, resolved=parse_config(text, given, where="config.toml"), reporter=said), said


def begun_before(run: Run, *, complete: bool) -> Path:
    """The stage's folder as an older version left it."""
    folder = run.workspace.stage(train_stage.STAGE)
    (folder / FINAL).mkdir(parents=True)
    (folder / FINAL / "weights").write_text("as they are")
    fields = {n: v for n, v in train_stage.fingerprint(run, student_prompts(run)).fields.items() if n != CLIP}
    manifest = Manifest.start(train_stage.STAGE, Fingerprint(fields))
    shards = {FINAL: describe_shard(folder, FINAL, 0)}
    done = {"complete": complete, "summary": {"steps": 3}, "shards": shards}
    write_manifest(folder, manifest.model_copy(update=done))
    return folder


def test_what_is_finished_is_done_before(tiny_run: Run) -> None:
    run, said = opened(tiny_run)
    begun_before(run, complete=True)
    assert CLIP not in loop.train(run).fields
    assert said.warnings == []
    other, _ = opened(tiny_run, "train.learning_rate=1e-3")
    with pytest.raises(FingerprintMismatchError, match=r"train\.learning_rate"):
        loop.train(other)


def test_the_rest_of_what_is_not_is_weighted_and_says_so(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise TropdError("here")

    monkeypatch.setattr(loop, "open_session", stop)
    run, said = opened(tiny_run)
    begun_before(run, complete=False)
    with pytest.raises(TropdError, match="here"):
        loop.train(run)
    [warning] = said.warnings
    assert "the remaining steps are weighted (train.importance_clip)" in warning


def test_what_is_begun_now_records_it(tiny_run: Run) -> None:
    for assignments, recorded in (
        (("train.importance_clip=3.0",), 3.0),
        (('student.dtype="float32"',), None),
    ):
        run, _ = opened(tiny_run, *assignments)
        assert train_stage.fingerprint(run, student_prompts(run)).fields.get(CLIP) == recorded


def test_other_sizes_of_passes_are_told_when_it_resumes(tiny_run: Run) -> None:
    sizes = ("train.micro_batch_tokens=4096", "service.batch_tokens=512")
    begun, _ = opened(tiny_run, *sizes)
    run, said = opened(tiny_run, "train.micro_batch_tokens=4096", "service.batch_tokens=256")
    assert train_stage.fingerprint(run, student_prompts(run)) == train_stage.fingerprint(
        begun, student_prompts(begun)
    )
    before = train_stage.rounding_settings(begun)
    assert before == {"train.micro_batch_tokens": 4096, "service.batch_tokens": 512}
    train_stage.tell_rounding(run, before)
    [warning] = said.warnings
    assert warning.startswith(
        "train: service.batch_tokens is 256 now, and was 512: the remaining steps are rounded"
    )
    train_stage.tell_rounding(begun, before)
    for earlier in ({}, {"train.micro_batch_tokens": 4096}):  # of a version that kept none, or fewer
        train_stage.tell_rounding(run, earlier)
    assert len(said.warnings) == 1
    alone, _ = opened(tiny_run, *sizes, 'objective.name="sft"')
    assert "service.batch_tokens" not in train_stage.rounding_settings(alone), "no teacher is asked"
