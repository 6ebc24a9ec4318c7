"""A name that is none of its kind is refused with those that are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd.storage.errors import ConfigError, unknown_name
from tropd.storage.verify.verify import verify_workspace
from tropd.storage.workspace import Workspace, scores_stage, stage_kind


def test_an_unknown_name_is_told_with_a_close_one_and_all_valid_ones() -> None:
    error = unknown_name("stage", "trian", ["train", "eval"])
    assert str(error) == "unknown stage 'trian'\n  → did you mean 'train'? one of: train, eval"
    assert error.exit_code == 2


def test_unknown_stages_list_the_valid_ones(tmp_path: Path) -> None:
    for ask in (
        lambda: stage_kind("prefix"),
        lambda: verify_workspace(Workspace.create(tmp_path), ["prefix"]),
    ):
        with pytest.raises(
            ConfigError, match=r"unknown stage 'prefix'(?s:.*)'prefixes'.*rollout-scores.*train"
        ):
            ask()
    with pytest.raises(ConfigError, match=r"trajectories 'train'(?s:.*)one of: prefixes, rollouts$"):
        scores_stage("train")
