"""Which checkpoint a run goes on from, and when it refuses to."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tropd.pipeline.training.record.checkpoint import (
    TENSORS,
    CheckpointWriter,
    checkpoint_name,
    load_checkpoint,
    newest_checkpoint,
    remove_uncommitted,
    settings_of,
)
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import DamagedShardError, DiskFullError, TropdError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.stage.stage import Stage, open_stage

IDENTITY = Fingerprint({"a": 1})


def model_and_optimizer(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage with checkpoints after 1, 2 and 3 steps, of which the last two are kept."""
    model, optimizer = model_and_optimizer()
    with (
        open_stage(tmp_path / "train", "train", IDENTITY) as stage,
        CheckpointWriter(stage, keep=2) as writer,
    ):
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            writer.save(step + 1, model, optimizer, {"tokens": step}, settings={"size": step})
    return tmp_path / "train"


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    with open_stage(folder, "train", IDENTITY) as opened:
        yield opened


def tensors_of(folder: Path, step: int) -> Path:
    (path,) = (folder / checkpoint_name(step) / TENSORS).glob("*.safetensors")
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_training_goes_on_bit_for_bit(stage: Stage) -> None:
    straight, straight_optimizer = model_and_optimizer()
    train(straight, straight_optimizer, range(6))
    resumed, resumed_optimizer = model_and_optimizer(seed=5)
    assert load_checkpoint(newest_checkpoint(stage), resumed, resumed_optimizer) == (3, {"tokens": 2})
    assert settings_of(newest_checkpoint(stage)) == {"size": 2}
    train(resumed, resumed_optimizer, range(3, 6))
    for (name, one), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TropdError, match="earlier version"):
        load_checkpoint(tmp_path, *model_and_optimizer())


def test_without_a_checkpoint_training_begins(tmp_path: Path) -> None:
    with open_stage(tmp_path / "train", "train", IDENTITY) as stage:
        assert newest_checkpoint(stage) is None
    assert load_checkpoint(None, *model_and_optimizer()) == (0, {})


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "folder gone"])
def test_the_one_before_stands_in_for_a_damaged_one(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tensors_of(folder, 3)
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
        if damage == "folder gone":
            shutil.rmtree(path.parent)
    with caplog.at_level(logging.WARNING), open_stage(folder, "train", IDENTITY) as stage:
        newest = newest_checkpoint(stage)
        assert newest == folder / checkpoint_name(2)
        assert list(stage.manifest.shards) == [checkpoint_name(2)]
        remove_uncommitted(stage)
    assert "resuming from checkpoints/step-000002; damaged" in caplog.text
    assert checkpoint_name(3) in caplog.text
    assert not (folder / checkpoint_name(3)).exists()
    assert damage == "folder gone" or (folder.parent / "damaged/train" / checkpoint_name(3)).is_dir()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert list(manifest.shards) == [checkpoint_name(2)]


@pytest.mark.parametrize("again", [1, 2])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder: Path, again: int) -> None:
    tensors_of(folder, 2).unlink()
    flip(tensors_of(folder, 3))
    manifest = (folder / "manifest.json").read_bytes()
    for _ in range(again):
        with (
            open_stage(folder, "train", IDENTITY) as stage,
            pytest.raises(DamagedShardError) as caught,
        ):
            newest_checkpoint(stage)
        assert "checkpoints/step-000002: missing or truncated" in str(caught.value)
        assert "checkpoints/step-000003" in str(caught.value)
        assert "--force" in str(caught.value.hint)
        assert (folder / "manifest.json").read_bytes() == manifest
    # Put back, it is as before.
    flip(tensors_of(folder, 3))
    with open_stage(folder, "train", IDENTITY) as stage:
        assert newest_checkpoint(stage) == folder / checkpoint_name(3)


def test_a_checkpoint_that_was_not_committed_is_set_aside(folder: Path) -> None:
    shutil.copytree(folder / checkpoint_name(3), folder / checkpoint_name(4))
    shutil.copytree(folder / checkpoint_name(2), folder / checkpoint_name(1))
    with open_stage(folder, "train", IDENTITY) as stage:
        (aside,) = remove_uncommitted(stage)
        assert newest_checkpoint(stage) == folder / checkpoint_name(3)
    assert content_digest(aside) == content_digest(folder / checkpoint_name(3))
    assert not (folder / checkpoint_name(1)).exists()


def test_checkpoints_that_an_older_manifest_does_not_know_stay(folder: Path) -> None:
    for step in (4, 5):
        shutil.copytree(folder / checkpoint_name(3), folder / checkpoint_name(step))
    before = content_digest(folder)
    with (
        open_stage(folder, "train", IDENTITY) as stage,
        pytest.raises(DamagedShardError, match=r"manifest\.json is older than .*step-000004, .*step-000005"),
    ):
        remove_uncommitted(stage)
    assert content_digest(folder) == before


def test_a_full_disk_leaves_the_checkpoint_before(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tropd.pipeline.training.record.sharded_tensors.save_file", fail)
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    with CheckpointWriter(stage, keep=1) as writer:
        writer.save(4, model, optimizer, {})
        with pytest.raises(DiskFullError, match="step-000004"):
            writer.wait()
    assert newest_checkpoint(stage) == folder / checkpoint_name(3)
    assert not list((folder / "checkpoints").glob(".tmp-*"))
