"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; atomic, resumed bit for bit.

Random numbers, data order, learning rate and guidance are functions of the step, so the step is all their state.
Tensors are stored whole, whatever the number of processes that train: a run may go on with another number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tropd.pipeline.training.student import fill, whole
from tropd.storage.atomic import atomic_directory
from tropd.storage.errors import DamagedShardError
from tropd.storage.manifest import check_shard
from tropd.storage.stage import Stage

FOLDER = "checkpoints"
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps, relative to the stage folder."""
    return f"{FOLDER}/step-{step:06d}"


def save_checkpoint(
    stage: Stage | None,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write the state after ``step`` steps, commit it, then delete all but the newest ``keep``.

    Args:
        stage: None in a process that only takes part, by gathering what is sharded.
        counters: JSON-serialisable sums over the run so far.
    """
    weights = _gathered(_trained(model) | _saved_buffers(model), keep=stage is not None)
    moments = _gathered(_optimizer_tensors(optimizer), keep=stage is not None)
    if stage is None:
        return
    with atomic_directory(stage.folder / checkpoint_name(step)) as folder:
        save_file(weights, folder / WEIGHTS)
        save_file(moments, folder / MOMENTS)
        (folder / "state.json").write_text(json.dumps({"step": step, "counters": counters}, sort_keys=True))
    stage.commit(checkpoint_name(step), rows=step)
    prune_checkpoints(stage, keep)


def _gathered(tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors in main memory, one gathered after the other."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.cpu().contiguous()
    return found


def _trained(model: Any) -> dict[str, torch.Tensor]:
    """What training changes: with adapters, these only."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _saved_buffers(model: Any) -> dict[str, torch.Tensor]:
    names = {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in names}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def prune_checkpoints(stage: Stage, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for name in _checkpoints(stage)[:-keep]:
        stage.retire(name)
        shutil.rmtree(stage.folder / name)


def newest_checkpoint(stage: Stage) -> Path | None:
    """The newest checkpoint that matches its checksum; others are forgotten. None without any."""
    for name in reversed(_checkpoints(stage)):
        try:
            check_shard(stage.folder, stage.manifest.shards[name])
        except DamagedShardError:
            stage.retire(name)
            continue
        return stage.folder / name
    return None


def load_checkpoint(
    folder: Path | None, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restore a checkpoint into model and optimiser; returns the steps done and the counters. Without one, step 0."""
    if folder is None:
        return 0, {}
    tensors = _trained(model) | _saved_buffers(model)
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        for name, tensor in tensors.items():
            fill(tensor, stored.get_tensor(name))
    _load_optimizer(optimizer, folder / MOMENTS)
    saved = json.loads((folder / "state.json").read_text())
    return int(saved["step"]), dict(saved["counters"])


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """AdamW has its moments from its first step on: each is made like its parameter, then filled."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with safe_open(path, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118  (it cannot be iterated over)
            index, name = key.split(".", 1)
            parameter, value = parameters[int(index)], stored.get_tensor(key)
            state = optimizer.state[parameter]
            state[name] = value if value.ndim == 0 else torch.zeros_like(parameter)
            if value.ndim:
                fill(state[name], value)


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
