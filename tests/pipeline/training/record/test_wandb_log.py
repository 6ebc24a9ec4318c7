"""What goes to Weights & Biases, with a stand-in for its library."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tropd.pipeline.training.record.wandb_log import check_wandb, open_wandb, wandb_identity
from tropd.storage.errors import ConfigError, DamagedShardError


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.run = FakeRun()
    module.asked = {}

    def init(**options: Any) -> FakeRun:
        module.asked = options
        run: FakeRun = module.run
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_numbers_are_logged_by_step_and_the_run_is_found_again(wandb: Any, tmp_path: Path) -> None:
    check_wandb("distil")
    with open_wandb("distil", "mine", "abc", {"a": 1}, tmp_path) as log:
        log({"step": 4, "loss": 0.5, "teacher_retries": [0], "teacher_entropy": None, "tokens_on_policy": 3})
    assert wandb.run.logged == [(4, {"loss": 0.5, "tokens_on_policy": 3})]
    assert wandb.run.exit_code == 0
    assert (wandb.asked["id"], wandb.asked["resume"]) == ("abc", "allow")
    assert (wandb.asked["project"], wandb.asked["name"]) == ("distil", "mine")


def test_a_run_that_fails_is_marked_as_failed(wandb: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), open_wandb("distil", "mine", "abc", {}, tmp_path):
        raise ValueError("no")
    assert wandb.run.exit_code == 1


def test_an_id_belongs_to_one_run(tmp_path: Path) -> None:
    for folder in ("train", "train.old-1", "other"):
        (tmp_path / folder).mkdir()
    one = wandb_identity(tmp_path / "train")
    assert wandb_identity(tmp_path / "train") == one, "a run that goes on has the same"
    assert len({one, wandb_identity(tmp_path / "train.old-1"), wandb_identity(tmp_path / "other")}) == 3


@pytest.mark.parametrize("content", [b"", b'{"id": "a', b"5", b'{"id": "../../x"}', b"\xff"])
def test_an_id_that_cannot_be_read_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb.json").write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"wandb\.json"):
        wandb_identity(tmp_path)
    assert (tmp_path / "wandb.json").read_bytes() == content


def test_without_a_project_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(None)
    with open_wandb(None, "mine", "abc", {}, tmp_path) as log:
        log({"step": 0})


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd.pipeline.training.record.wandb_log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb") as caught:
        check_wandb("distil")
    assert "tropd[wandb]" in str(caught.value.hint)
