"""gc removes leftovers and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from storage_samples import build_workspace, tree

from tropd.storage.disk.garbage import collect_garbage
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import lock_stage, open_stage
from tropd.storage.verify.verify import repair, verify_workspace
from tropd.storage.workspace import Workspace

DEAD = 2**22 + 1  # above the largest process id


@pytest.fixture
def littered(tmp_path: Path) -> Workspace:
    workspace = build_workspace(tmp_path / "w", parts=2, rows=2)
    (workspace.stage("prefixes") / "part-00001.parquet").write_bytes(b"damaged")
    repair(workspace, verify_workspace(workspace))
    with open_stage(workspace.stage("eval"), "eval", Fingerprint({"seed": 1})) as stage:
        (stage.folder / "part-x").write_text("old")
        stage.commit("part-x", rows=1)
    with open_stage(workspace.stage("eval"), "eval", Fingerprint({"seed": 2}), force=True):
        pass
    (workspace.stage("scores") / f".tmp-{DEAD}-part.zarr" / "c").mkdir(parents=True)
    (workspace.stage("scores") / f".tmp-{DEAD}-part.zarr" / "c" / "0").write_bytes(b"12345")
    (workspace.stage("train") / "checkpoints").mkdir(parents=True)
    (workspace.stage("train") / "checkpoints" / f".tmp-{DEAD}-step-1").write_text("x")
    (workspace.stage("train") / "notes.txt").write_text("mine")
    (workspace.root / "eval.old-fashioned").write_text("mine")
    (workspace.root / f".tmp-{DEAD}-config.toml").write_text("x")
    (workspace.root / f".tmp-{os.getpid()}-config.toml").write_text("being written")
    return workspace


EXPECTED = {
    f".tmp-{DEAD}-config.toml": "left by a killed writer",
    "damaged": "set aside by repair",
    "eval.old-1": "moved aside by --force",
    f"scores/.tmp-{DEAD}-part.zarr": "left by a killed writer",
    f"train/checkpoints/.tmp-{DEAD}-step-1": "left by a killed writer",
}


def test_dry_run_changes_nothing_and_the_real_run_only_this(littered: Workspace) -> None:
    before = tree(littered.root)
    planned = collect_garbage(littered, dry_run=True)
    assert {g.path: g.reason for g in planned} == EXPECTED
    assert {g.path: g.bytes for g in planned}[f"scores/.tmp-{DEAD}-part.zarr"] == 5
    assert tree(littered.root) == before
    assert collect_garbage(littered, dry_run=False) == planned
    left = tree(littered.root)
    gone = {name for name in before if name.startswith(tuple(EXPECTED))}
    assert {k: v for k, v in before.items() if k not in gone} == {
        k: v for k, v in left.items() if not k.endswith("/")
    }
    assert collect_garbage(littered, dry_run=False) == []


def test_a_running_stage_keeps_its_temporaries(littered: Workspace) -> None:
    with lock_stage(littered.stage("scores")):
        removed = {g.path for g in collect_garbage(littered, dry_run=False)}
    assert removed == EXPECTED.keys() - {f"scores/.tmp-{DEAD}-part.zarr"}
