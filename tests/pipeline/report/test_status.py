"""Where a run stands, and which command is next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tropd.pipeline.report.status import Status, count_steps, workspace_status
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, describe_shard, write_manifest
from tropd.storage.workspace import STAGES, Workspace

CONFIG = """
[data]
limit = 10
[prefixes]
shard_prompts = 4
[objective]
name = "{objective}"
[train]
steps = 20
[demo]
enabled = {enabled}
"""

COMMANDS = {kind.name: kind.command for kind in STAGES if kind.listed}


def make(tmp_path: Path, *, demo: bool = True, objective: str = "tropd") -> Workspace:
    workspace = Workspace.create(tmp_path / "my run")
    workspace.config_path.write_text(CONFIG.format(enabled=str(demo).lower(), objective=objective))
    return workspace


def stage(workspace: Workspace, name: str, shards: dict[str, int], *, complete: bool = True) -> None:
    folder = workspace.stage(name)
    folder.mkdir(exist_ok=True)
    for shard in shards:
        (folder / shard).write_bytes(b"x" * 100)
    described = {shard: describe_shard(folder, shard, rows) for shard, rows in shards.items()}
    manifest = Manifest.start(name, Fingerprint({"a": 1}))
    write_manifest(folder, manifest.model_copy(update={"shards": described, "complete": complete}))


def metrics(workspace: Workspace, steps: int, tail: str = "") -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(steps)]
    folder = workspace.stage("train")
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail)


def report(workspace: Workspace) -> None:
    """What the report leaves, as far as the status looks at it."""
    stages = {
        s.name: {"state": s.state, "fingerprint": s.fingerprint, "rows": s.rows, "done": s.done}
        for s in workspace_status(workspace).stages
        if s.name != "report"
    }
    folder = workspace.stage("report")
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"stages": stages}))
    (folder / "index.html").write_text("<p>")


def finish(workspace: Workspace) -> None:
    stage(workspace, "models", {"teacher": 1, "student": 1})
    stage(workspace, "prefixes", {"part-00000.parquet": 4, "part-00001.parquet": 4, "part-00002.parquet": 2})
    stage(workspace, "scores", {f"part-0000{i}.{end}": 4 for i in range(3) for end in ("zarr", "parquet")})
    stage(workspace, "train", {"final": 20})
    metrics(workspace, 20)
    stage(workspace, "eval", {f"part-{who}.parquet": 8 for who in ("before", "after", "teacher")})


def states(status: Status) -> dict[str, str]:
    return {s.name: s.state for s in status.stages}


def test_a_new_workspace_begins_with_prepare_for_the_demo_and_with_prefixes_otherwise(tmp_path: Path) -> None:
    status = workspace_status(make(tmp_path / "a"))
    assert states(status) == dict.fromkeys(COMMANDS, "not started")
    assert status.next_command is not None
    assert status.next_command.startswith("tropd prepare -w ")
    other = workspace_status(make(tmp_path / "b", demo=False))
    assert "models" not in states(other)
    assert other.next_command is not None
    assert other.next_command.startswith("tropd generate-prefixes -w ")


def test_the_next_command_walks_through_the_stages(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    walked = []
    for name, command in COMMANDS.items():
        assert str(workspace_status(workspace).next_command).startswith(f"tropd {command} -w ")
        walked.append(name)
        if name == "report":
            report(workspace)
        else:
            stage(workspace, name, {"part-00000.parquet": 1})
    status = workspace_status(workspace)
    assert walked == list(COMMANDS)
    assert status.next_command is None
    assert "everything is done" in status.next_reason


def test_the_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make(tmp_path)
    assert workspace_status(workspace).next_command == f"tropd prepare -w '{workspace.root}'"
    monkeypatch.chdir(tmp_path)
    assert workspace_status(workspace).next_command == "tropd prepare -w 'my run'"


def test_progress_is_counted_where_it_can_be(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    (workspace.root / "data").mkdir()
    (workspace.root / "data" / "train.jsonl").write_text("{}\n" * 50)
    stage(workspace, "prefixes", {"part-00000.parquet": 4}, complete=False)
    found = workspace_status(workspace).stage("prefixes")
    assert found is not None
    assert (found.state, found.progress_text, found.rows) == ("in progress", "1 of 3 shards", 4)
    stage(workspace, "prefixes", {"part-00000.parquet": 4, "part-00001.parquet": 4})
    stage(workspace, "scores", {"part-00000.zarr": 4, "part-00000.parquet": 4}, complete=False)
    scores = workspace_status(workspace).stage("scores")
    assert scores is not None
    assert (scores.progress_text, scores.rows) == ("1 of 2 shards", 4)


def test_training_counts_steps(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    stage(workspace, "train", {}, complete=False)
    metrics(workspace, 7, '{"step": 7, "lo')
    status = workspace_status(workspace)
    train = status.stage("train")
    assert train is not None
    assert (train.progress_text, train.rows) == ("step 7 of 20, none saved yet", 7)
    assert str(status.next_command).startswith("tropd train -w ")
    assert status.next_reason == "train is not finished (step 7 of 20, none saved yet)"


@pytest.mark.parametrize(("saved", "text"), [(5, "step 7 of 20, saved up to step 5"), (7, "step 7 of 20")])
def test_training_tells_what_a_stop_would_lose(tmp_path: Path, saved: int, text: str) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    (workspace.stage("train") / "checkpoints").mkdir()
    stage(workspace, "train", {f"checkpoints/step-{step:06d}": step for step in (3, saved)}, complete=False)
    metrics(workspace, 7)
    train = workspace_status(workspace).stage("train")
    assert train is not None
    assert train.progress_text == text


def test_an_evaluation_counts_the_models_that_have_all_responses(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    shards = ["responses-before", "responses-after", "distance-before", "part-before", "part-after-00000"]
    stage(workspace, "eval", {f"{name}.parquet": 8 for name in shards}, complete=False)
    found = workspace_status(workspace).stage("eval")
    assert found is not None
    assert found.progress_text == "1 of 3 models"


@pytest.mark.parametrize(
    ("objective", "without"),
    [("opd", ["prefixes", "scores"]), ("tropd", ["scores"]), ("tropd-cached", [])],
)
def test_data_that_the_objective_has_no_use_for_is_not_asked_for(
    tmp_path: Path, objective: str, without: list[str]
) -> None:
    workspace = make(tmp_path, demo=False, objective=objective)
    status = workspace_status(workspace)
    assert [s.name for s in status.stages if not s.needed] == without
    assert ("tropd train" in str(status.next_command)) == ("prefixes" in without)


def test_steps_that_were_repeated_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "loss": 1}\n{"step": 0, "loss": 2}\n{"step": 1, "accuracy_greedy": 1}\n[]\n\n'
    )
    assert count_steps(path) == 1
    assert count_steps(tmp_path / "absent") == 0


def test_times_and_sizes(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    workspace.logs.mkdir()
    lines = [("data", 1.0), ("models", 5.0), ("train", 2.0), ("train", 3.5)]
    text = "".join(json.dumps({"stage": name, "seconds": value}) + "\n" for name, value in lines)
    (workspace.logs / "stages.jsonl").write_text(text)
    status = workspace_status(workspace)
    assert {s.name: s.seconds for s in status.stages if s.seconds} == {"models": 6.0, "train": 5.5}
    on_disk = sum(p.stat().st_size for p in workspace.root.rglob("*") if p.is_file())
    assert status.total_bytes == on_disk
    assert all(s.bytes > 0 for s in status.stages if s.name != "report")


def test_a_damaged_shard_is_named_and_made_again_by_its_stage(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    (workspace.stage("prefixes") / "part-00001.parquet").unlink()
    (workspace.stage("prefixes") / "part-00002.parquet").write_bytes(b"x")
    status = workspace_status(workspace)
    found = status.stage("prefixes")
    assert found is not None
    assert found.state == "damaged"
    assert found.problem == "part-00001.parquet is missing; part-00002.parquet has 1 bytes instead of 100"
    assert str(status.next_command).startswith("tropd generate-prefixes -w ")
    assert "--force" not in str(status.next_command)


def test_an_unreadable_manifest_needs_a_new_start(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    (workspace.stage("scores") / "manifest.json").write_text('{"schema_version": 1')
    status = workspace_status(workspace)
    assert states(status)["scores"] == "damaged"
    assert str(status.next_command).startswith("tropd score-teacher -w ")
    assert str(status.next_command).endswith(" --force")
    (workspace.stage("scores") / "manifest.json").write_text('{"schema_version": 99}')
    found = workspace_status(workspace).stage("scores")
    assert found is not None
    assert "schema version 99" in found.problem


def test_lost_problem_files_are_made_again_by_prepare(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    stage(workspace, "data", {"train.jsonl": 10})
    (workspace.stage("data") / "train.jsonl").unlink()
    status = workspace_status(workspace)
    found = status.stage("models")
    assert found is not None
    assert found.problem == "data/train.jsonl is missing"
    assert str(status.next_command).startswith("tropd prepare -w ")


def test_a_broken_configuration_comes_first(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    workspace.config_path.write_text("[train]\nstepz = 3\n")
    status = workspace_status(workspace)
    assert str(status.next_command).startswith("tropd config show -w ")
    assert "stepz" in status.next_reason
    assert states(status)["train"] == "complete"


def test_a_purely_on_policy_run_is_not_sent_back_for_prefixes(tmp_path: Path) -> None:
    workspace = make(tmp_path, demo=False)
    stage(workspace, "train", {"final": 20})
    metrics(workspace, 20)
    assert str(workspace_status(workspace).next_command).startswith("tropd evaluate -w ")


def test_the_report_is_stale_once_results_change(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    report(workspace)
    assert workspace_status(workspace).next_command is None
    stage(workspace, "eval", {"part-before.parquet": 9}, complete=False)
    stage(workspace, "eval", {f"part-{who}.parquet": 9 for who in ("before", "after", "teacher")})
    status = workspace_status(workspace)
    assert states(status)["report"] == "in progress"
    assert status.next_reason == "the report is older than the results"
    (workspace.stage("report") / "report.json").write_text("{")
    assert states(workspace_status(workspace))["report"] == "damaged"


def test_it_is_plain_data(tmp_path: Path) -> None:
    status = workspace_status(make(tmp_path))
    assert Status.model_validate_json(status.model_dump_json()) == status


def test_a_trial_is_complete_for_its_own_steps(tmp_path: Path) -> None:
    workspace = make(tmp_path)
    finish(workspace)
    metrics(workspace, 3)
    folder = workspace.stage("train")
    manifest = Manifest.start("train", Fingerprint({"train.steps": 3}))
    shards = {"final": describe_shard(folder, "final", 3)}
    write_manifest(folder, manifest.model_copy(update={"shards": shards, "complete": True}))
    train = workspace_status(workspace).stage("train")
    assert train is not None
    assert (train.state, train.progress_text) == ("complete", "step 3 of 3")
    command = f"tropd train -w '{workspace.root}' --force"
    assert train.problem == (
        f"complete for train.steps = 3, while config.toml says 20: {command} trains anew"
    )
