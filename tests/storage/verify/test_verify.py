"""verify finds what is wrong and says where; repair and a rerun restore the same bytes."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_samples import build_workspace, topk_of, trajectory, tree

from tropd.storage.cache.shard import write_topk
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import StageLockedError
from tropd.storage.formats.step_log import log_line
from tropd.storage.formats.trajectories import write_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import describe_shard, read_manifest, write_manifest
from tropd.storage.stage.stage import lock_stage, open_stage
from tropd.storage.verify.verify import Finding, repair, verify_workspace
from tropd.storage.workspace import Workspace

ZARR = "scores/part-00001.zarr"
PARQUET = "prefixes/part-00001.parquet"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return build_workspace(tmp_path / "w", parts=2, rows=3)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def recommit(workspace: Workspace, path: str, rows: int | None = None) -> None:
    """Give a changed shard the checksum of its new content: what a wrong writer would have left."""
    stage, name = path.split("/", 1)
    manifest = read_manifest(workspace.stage(stage))
    assert manifest is not None
    shard = describe_shard(workspace.stage(stage), name, manifest.shards[name].rows if rows is None else rows)
    write_manifest(
        workspace.stage(stage), manifest.model_copy(update={"shards": {**manifest.shards, name: shard}})
    )


def test_sound_and_empty_workspaces_have_no_findings(workspace: Workspace, tmp_path: Path) -> None:
    assert verify_workspace(workspace) == []
    assert verify_workspace(Workspace.create(tmp_path / "empty")) == []


def test_random_bit_flips_are_all_found(workspace: Workspace) -> None:
    """Over every file of the cache, manifests included."""
    files = sorted(p for s in ("scores", "prefixes") for p in workspace.stage(s).rglob("*") if p.is_file())
    rng = random.Random(0)
    for _ in range(150):
        path = rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        errors = [f for f in verify_workspace(workspace) if f.severity == "error"]
        assert any((workspace.root / f.path) in (path, *path.parents) for f in errors), path
        path.write_bytes(good)
    assert verify_workspace(workspace) == []


@pytest.mark.parametrize("path", [ZARR, PARQUET])
def test_repair_and_rerun_restore_the_same_bytes(workspace: Workspace, path: str) -> None:
    before = tree(workspace.root)
    target = workspace.root / path
    damaged = target / "sampled" / "c" / "0" if target.is_dir() else target
    damaged.write_bytes(damaged.read_bytes()[:-1])
    findings = verify_workspace(workspace)
    assert [(f.path, f.shard) for f in findings if f.severity == "error"] == [(path, Path(path).name)]
    (line,) = repair(workspace, findings)
    assert f"moved to damaged/{path}" in line
    assert (workspace.root / "damaged" / path).exists()
    assert verify_workspace(workspace) == []
    stage = path.split("/")[0]
    manifest = read_manifest(workspace.stage(stage))
    assert manifest is not None
    assert (manifest.complete, list(manifest.shards)) == (False, [Path(path).name.replace("1", "0")])
    build_workspace(workspace.root, parts=2, rows=3)
    shutil.rmtree(workspace.root / "damaged")
    assert tree(workspace.root) == before


def test_repairing_twice_keeps_both_copies(workspace: Workspace) -> None:
    for number in range(2):
        (workspace.root / PARQUET).write_bytes(b"damaged %d" % number)
        repair(workspace, verify_workspace(workspace))
        build_workspace(workspace.root, parts=2, rows=3)
    kept = sorted((workspace.root / "damaged/prefixes").iterdir())
    assert [p.read_bytes() for p in kept] == [b"damaged 0", b"damaged 1"]


def test_missing_shard(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root / ZARR)
    finding = only(verify_workspace(workspace))
    assert str(finding) == f"error: {ZARR}: is missing, but its manifest lists it"
    assert repair(workspace, [finding]) == [f"{ZARR}: was missing; rerun the stage to make it again"]
    assert verify_workspace(workspace) == []


def test_foreign_files_are_named_and_left_alone(workspace: Workspace) -> None:
    (workspace.stage("scores") / "notes.txt").write_text("mine")
    (workspace.stage("scores") / "sub").mkdir()
    (workspace.stage("scores") / "sub" / "x").write_text("mine")
    (workspace.stage("scores") / ".tmp-1-part").write_text("interrupted")
    folder = train_stage(workspace)
    for name in ("samples.jsonl", "trace.json", "wandb.json"):
        (folder / name).touch()
    findings = verify_workspace(workspace)
    assert [(f.severity, f.path) for f in findings] == [
        ("note", "scores/notes.txt"),
        ("note", "scores/sub/x"),
    ]
    assert repair(workspace, findings) == []
    assert (workspace.stage("scores") / "notes.txt").exists()


def test_damaged_manifest_is_reported_and_not_guessed(workspace: Workspace) -> None:
    (workspace.stage("scores") / "manifest.json").write_text("{")
    finding = only(verify_workspace(workspace))
    assert finding.path == "scores/manifest.json"
    assert "cannot be repaired here" in repair(workspace, [finding])[0]


def test_missing_manifest_is_an_error_where_there_is_output(workspace: Workspace) -> None:
    (workspace.stage("scores") / "manifest.json").unlink()
    finding = only(verify_workspace(workspace))
    assert (finding.severity, finding.path) == ("error", "scores/manifest.json")
    (workspace.stage("data")).mkdir()
    (workspace.stage("data") / "mine.jsonl").write_text("brought by the user")
    assert only(verify_workspace(workspace)) == finding


def train_stage(workspace: Workspace) -> Path:
    """A training stage with two checkpoints and the metrics of its four steps."""
    folder = workspace.stage("train")
    with open_stage(folder, "train", Fingerprint({"seed": 1})) as stage:
        for step in (2, 4):
            write_text_atomic(folder / f"checkpoints/step-{step}" / "state.json", f"step {step}")
            stage.commit(f"checkpoints/step-{step}", rows=step)
        lines = [log_line({"step": step, "loss": 1 / (step + 1)}) for step in range(4)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_repair_leaves_checkpoints_where_none_is_whole(workspace: Workspace) -> None:
    folder = train_stage(workspace)
    assert verify_workspace(workspace) == []
    (folder / "checkpoints/step-4/state.json").write_text("damaged")
    (line,) = repair(workspace, verify_workspace(workspace))
    assert "moved to damaged/train/checkpoints/step-4" in line
    (folder / "checkpoints/step-2/state.json").write_text("damaged")
    before = tree(folder)
    (line,) = repair(workspace, verify_workspace(workspace))
    assert line.startswith(
        "train/checkpoints/step-2: left as it is, since no checkpoint is whole; put it back"
    )
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text.replace(b'"step": 2', b'"stop": 2'), "line 3 is damaged"),
        (lambda text: text.replace(b"0.5", b"0.4"), "line 2 is damaged"),
        (lambda text: text[:40] + bytes(400) + text[40:], "line 1 is damaged"),
        (lambda text: text + b"5\n", "line 5 is damaged"),
        (lambda text: text[:-4], "line 4 is damaged"),
        (lambda text: b"", "has no record of step 0 to 3"),
        (lambda text: text[: text.index(b"\n") + 1], "has no record of step 1 to 3"),
    ],
)
def test_damaged_metrics_are_found(
    workspace: Workspace, damage: Callable[[bytes], bytes], problem: str
) -> None:
    path = train_stage(workspace) / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    findings = verify_workspace(workspace)
    assert (findings[0].path, findings[0].problem) == ("train/metrics.jsonl", problem)
    assert "tropd train sets damaged lines aside" in repair(workspace, findings)[0]


def test_a_line_that_a_kill_has_torn_is_no_damage(workspace: Workspace) -> None:
    path = train_stage(workspace) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    assert verify_workspace(workspace) == []


def test_fields_and_fingerprint_must_agree(workspace: Workspace) -> None:
    manifest = read_manifest(workspace.stage("prefixes"))
    assert manifest is not None
    write_manifest(workspace.stage("prefixes"), manifest.model_copy(update={"fields": {"seed": 3}}))
    assert "do not have its fingerprint" in only(verify_workspace(workspace)).problem


def test_scores_of_other_trajectories(workspace: Workspace) -> None:
    with open_stage(workspace.stage("prefixes"), "prefixes", Fingerprint({"seed": 2}), force=True) as stage:
        stage.finish()
    assert "made from other trajectories" in only(verify_workspace(workspace)).problem


def test_wrong_row_counts(workspace: Workspace) -> None:
    recommit(workspace, PARQUET, rows=9)
    recommit(workspace, ZARR, rows=8)
    problems = [f.problem for f in verify_workspace(workspace)]
    assert problems == ["has 3 rows, its manifest says 9", "has 3 rows, its manifest says 8"]


def test_repeated_trajectories(workspace: Workspace) -> None:
    rows = [trajectory(100), trajectory(0), trajectory(102)]
    write_trajectories(workspace.root / PARQUET, rows)
    recommit(workspace, PARQUET)
    problems = {f.problem for f in verify_workspace(workspace)}
    assert "repeats prompt 'p0', sample 0 of part-00000.parquet" in problems


ROWS = [trajectory(100 + i) for i in range(3)]


def with_sampled(data: object, position: int, value: float) -> object:
    sampled = data.teacher_logprobs.copy()  # type: ignore[attr-defined]
    sampled[position] = value
    return dataclasses.replace(data, teacher_logprobs=sampled)  # type: ignore[type-var]


def wrong_scores(kind: str) -> object:
    data = topk_of(ROWS, seed=1, k=50, mass=1.0)  # every token is among its alternatives
    few = topk_of(ROWS, seed=1, k=1)
    tokens = np.concatenate([row.tokens for row in ROWS])
    outside = int(np.argmax(few.ids != tokens))
    return {
        "same id": with_sampled(data, 2, -30.0),
        "likelier": with_sampled(few, outside, -0.0),
        "rows and lengths": topk_of([trajectory(i, num_tokens=n) for i, n in enumerate((4, 5, 6))]),
        "outside the vocabulary": dataclasses.replace(few, ids=few.ids + 50),
        "add up to 1": dataclasses.replace(few, tail=few.tail * 0),
        "listed twice": dataclasses.replace(
            few,
            ids=tokens.repeat(2).astype(np.int32),
            counts=np.full(15, 2, np.uint16),
            logprobs=np.full(30, np.log(0.5), np.float16),
            tail=np.full(15, -np.inf, np.float32),
            teacher_logprobs=np.full(15, np.log(0.5), np.float32),
        ),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["same id", "likelier", "rows and lengths", "outside the vocabulary", "add up to 1", "listed twice"],
)
def test_scores_that_a_wrong_writer_left(
    workspace: Workspace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("tropd.storage.cache.shard.check_invariants", lambda data: [])
        write_topk(workspace.root / ZARR, wrong_scores(kind))  # type: ignore[arg-type]
    recommit(workspace, ZARR)
    finding = only(verify_workspace(workspace))
    assert kind in finding.problem
    assert (finding.path, finding.shard) == (ZARR, "part-00001.zarr")


@pytest.mark.parametrize("ids", [["p100", "p101", "p102"], ["p101", "p100", "p102"]])
def test_row_table_names_the_trajectories(workspace: Workspace, ids: list[str]) -> None:
    with open_stage(workspace.stage("scores"), "scores", _scores_fingerprint(workspace)) as stage:
        table = pa.table({"prompt_id": ids, "sample_index": pa.array([0, 0, 0], pa.int32())})
        pq.write_table(table, stage.folder / "part-00001.parquet")
        stage.commit("part-00001.parquet", rows=3)
    findings = verify_workspace(workspace)
    assert [f.problem for f in findings] == (
        [] if ids[0] == "p100" else ["does not name the trajectories of the shard that it belongs to"]
    )


def _scores_fingerprint(workspace: Workspace) -> Fingerprint:
    manifest = read_manifest(workspace.stage("scores"))
    assert manifest is not None
    return Fingerprint(manifest.fields)


def test_repair_waits_for_no_running_stage(workspace: Workspace) -> None:
    (workspace.root / PARQUET).write_bytes(b"x")
    findings = verify_workspace(workspace)
    with lock_stage(workspace.stage("prefixes")), pytest.raises(StageLockedError):
        repair(workspace, findings)
    assert (workspace.root / PARQUET).exists()


def test_checkpoint_retired_during_the_check_is_no_finding(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tropd.storage.verify import verify

    original = verify.check_shard

    def retiring(folder: Path, shard: object) -> None:
        if shard.name == "part-00001.zarr":  # type: ignore[attr-defined]
            with open_stage(workspace.stage("scores"), "scores", _scores_fingerprint(workspace)) as stage:
                stage.retire("part-00001.zarr")
            shutil.rmtree(workspace.root / ZARR)
        original(folder, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "check_shard", retiring)
    assert verify_workspace(workspace) == []


def test_problems_that_were_edited_are_noted_and_left_to_their_owner(workspace: Workspace) -> None:
    folder = workspace.stage("data")
    with open_stage(folder, "data", Fingerprint({})) as stage:
        write_text_atomic(folder / "train.jsonl", "{}\n")
        stage.commit("train.jsonl", 1)
        stage.finish()
    write_text_atomic(folder / "train.jsonl", "{}\n{}\n")
    finding = only(verify_workspace(workspace))
    assert (finding.severity, finding.path) == ("note", "data/train.jsonl")
    assert "edited or damaged" in finding.problem
    assert repair(workspace, [finding]) == []
    assert (folder / "train.jsonl").read_text() == "{}\n{}\n"
