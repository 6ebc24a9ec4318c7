"""Where training stands, read from the files of a run that another process is writing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.report.watch import training_progress
from tropd.storage.errors import TropdError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage
from tropd.storage.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace.create(tmp_path / "run")
    made.config_path.write_text(recipe_text("demo"))
    return made


def begin(workspace: Workspace, *records: str, finish: bool = False) -> None:
    fields = Fingerprint({"train.steps": 7, "objective.name": "opd", "run.seed": 3})
    with open_stage(workspace.stage("train"), "train", fields) as stage:
        (stage.folder / "metrics.jsonl").write_text("".join(records))
        if finish:
            stage.finish(steps=7)


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 0.5, "time_total": 0.1}) + "\n"


def test_a_workspace_without_training_says_how_to_begin(workspace: Workspace) -> None:
    with pytest.raises(TropdError, match="no training has begun") as caught:
        training_progress(workspace)
    assert "tropd train" in str(caught.value.hint)


def test_settings_are_those_that_training_was_started_with(workspace: Workspace) -> None:
    begin(workspace)
    found = training_progress(workspace)
    assert (found.title, found.total) == ("run · opd · seed 3", 7)
    assert (found.state, found.done) == ("starting", 0)


def test_a_torn_last_line_is_not_a_step(workspace: Workspace) -> None:
    begin(workspace, line(0), line(1), line(2)[:20])
    found = training_progress(workspace)
    assert (found.state, found.done) == ("running", 2)


def test_a_run_that_has_not_written_for_long_is_silent(workspace: Workspace) -> None:
    begin(workspace, line(0))
    path = workspace.stage("train") / "metrics.jsonl"
    os.utime(path, (time.time() - 3600,) * 2)
    assert training_progress(workspace).state == "silent"


def test_a_finished_run(workspace: Workspace) -> None:
    begin(workspace, *(line(n) for n in range(7)), finish=True)
    found = training_progress(workspace)
    assert (found.state, found.done, found.total) == ("finished", 7, 7)


def test_what_is_off_is_known_while_it_runs(workspace: Workspace) -> None:
    begin(workspace, *(json.dumps({"step": n, "k1_mean": 0.1 * n}) + "\n" for n in range(20)))
    assert [verdict.name for verdict in training_progress(workspace).verdicts] == ["k1-rising"]


@pytest.mark.parametrize("text", ["null\n", "[1]\n", '{"loss": 1}\n', "\x00\xff\n"])
def test_lines_that_are_no_records_are_passed_over(workspace: Workspace, text: str) -> None:
    begin(workspace, line(0), text, line(1))
    assert training_progress(workspace).done == 2
