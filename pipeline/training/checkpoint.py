"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; atomic, resumed bit for bit.

Random numbers, data order, learning rate and guidance are functions of the step, so the step is all their state.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from tropd.storage.atomic import atomic_directory
from tropd.storage.errors import DamagedShardError
from tropd.storage.manifest import check_shard
from tropd.storage.stage import Stage

FOLDER = "checkpoints"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps, relative to the stage folder."""
    return f"{FOLDER}/step-{step:06d}"


def save_checkpoint(
    stage: Stage,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write the state after ``step`` steps, commit it, then delete all but the newest ``keep``.

    Args:
        counters: JSON-serialisable sums over the run so far.
    """
    with atomic_directory(stage.folder / checkpoint_name(step)) as folder:
        save_model(model, str(folder / "model.safetensors"))
        tensors: dict[str, torch.Tensor] = {}
        state = optimizer.state_dict()["state"]
        for index, values in state.items():
            tensors.update({f"{index}.{name}": value.contiguous() for name, value in values.items()})
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, "counters": counters}, sort_keys=True))
    stage.commit(checkpoint_name(step), rows=step)
    prune_checkpoints(stage, keep)


def prune_checkpoints(stage: Stage, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for name in _checkpoints(stage)[:-keep]:
        stage.retire(name)
        shutil.rmtree(stage.folder / name)


def load_checkpoint(stage: Stage, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Restore the newest checkpoint into model and optimiser; returns the steps done and the counters.

    A checkpoint that does not match its checksum is passed over for the one before it. Without any, step 0.
    """
    for name in reversed(_checkpoints(stage)):
        try:
            check_shard(stage.folder, stage.manifest.shards[name])
        except DamagedShardError:
            stage.retire(name)
            continue
        folder = stage.folder / name
        load_model(model, str(folder / "model.safetensors"))
        _load_optimizer(optimizer, load_file(folder / "optimizer.safetensors"))
        saved = json.loads((folder / "state.json").read_text())
        return int(saved["step"]), dict(saved["counters"])
    return 0, {}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checkpoints(stage: Stage) -> list[str]:
    """Committed checkpoints, oldest first."""
    return sorted(name for name in stage.manifest.shards if name.startswith(f"{FOLDER}/"))


def remove_uncommitted(stage: Stage) -> None:
    """Delete checkpoint folders that a killed run left without an entry in the manifest."""
    folder: Path = stage.folder / FOLDER
    if folder.is_dir():
        for path in folder.iterdir():
            if f"{FOLDER}/{path.name}" not in stage.manifest.shards:
                shutil.rmtree(path)
