"""The workspace marker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd.storage.errors import ConfigError, WorkspaceVersionError
from tropd.storage.workspace import CACHE_STAGES, STAGES, Workspace, scores_stage, stage_kind


def test_create_is_idempotent_and_opens(tmp_path: Path) -> None:
    first = Workspace.create(tmp_path / "runs" / "w")
    assert Workspace.create(tmp_path / "runs" / "w") == first == Workspace.open(tmp_path / "runs" / "w")
    assert first.config_path == first.root / "config.toml"
    assert first.stage("scores") == first.root / "scores"
    assert first.logs == first.root / "logs"


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    workspace = Workspace.create(tmp_path)
    assert workspace.resolve("data/x.jsonl") == tmp_path.resolve() / "data/x.jsonl"
    assert workspace.resolve("/data/x.jsonl") == Path("/data/x.jsonl")
    assert workspace.resolve("~/x") == Path("/home/someone/x")


def test_not_a_workspace(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="not a tropd workspace"):
            Workspace.open(root)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_malformed_marker(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "workspace.json").write_bytes(content)
    with pytest.raises(WorkspaceVersionError, match="not readable"):
        Workspace.open(tmp_path)


def test_other_version(tmp_path: Path) -> None:
    (tmp_path / "workspace.json").write_text('{"layout": 2}')
    with pytest.raises(WorkspaceVersionError, match="layout 2; this tropd reads and writes layout 1"):
        Workspace.open(tmp_path)


def test_stages_come_after_what_they_are_made_from() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    for stage in STAGES:
        if stage.scores_of is not None:
            assert names.index(stage.scores_of) < names.index(stage.name)
            assert scores_stage(stage.scores_of) == stage.name
        assert stage_kind(stage.name) is stage
    assert CACHE_STAGES == ("prefixes", "scores", "rollouts", "rollout-scores")
