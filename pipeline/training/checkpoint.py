"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; atomic, resumed bit for bit.

Random numbers, data order, learning rate and guidance are functions of the step, so the step is all their state; rows
that older weights have rolled out for the next step are kept with it. A copy of the state is written in a thread,
while training goes on.
Tensors are stored whole, whatever the number of processes that train: a run may go on with another number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tropd.pipeline.training.rollouts import Row, RowPlan
from tropd.pipeline.training.student import fill, whole
from tropd.storage.atomic import atomic_directory
from tropd.storage.errors import DamagedShardError, InterruptedStageError
from tropd.storage.manifest import check_shard
from tropd.storage.stage import Stage

FOLDER = "checkpoints"
WEIGHTS, MOMENTS, ROWS = "model.safetensors", "optimizer.safetensors", "rows.safetensors"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps, relative to the stage folder."""
    return f"{FOLDER}/step-{step:06d}"


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; the block's end waits for the last.

    Args:
        stage: None in a process that only takes part, by gathering what is sharded.
        keep: newest checkpoints that are not deleted.
    """

    def __init__(self, stage: Stage | None, keep: int) -> None:
        self._stage = stage
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: Any,
        optimizer: torch.optim.Optimizer,
        counters: dict[str, Any],
        rows: Sequence[Row] | None = None,
    ) -> None:
        """Copy the state after ``step`` steps; write it, commit it, then delete the oldest.

        Args:
            counters: JSON-serialisable sums over the run so far.
            rows: those of the next step, where they are rolled out already.

        Raises:
            DiskError: the checkpoint before this one could not be written.
        """
        self.wait()
        leads = self._stage is not None
        files = {
            WEIGHTS: _gathered(_trained(model) | _saved_buffers(model), keep=leads),
            MOMENTS: _gathered(_optimizer_tensors(optimizer), keep=leads),
        }
        if rows is not None:
            files[ROWS] = _row_tensors(rows)
        state = json.dumps({"step": step, "counters": counters}, sort_keys=True)
        if self._stage is not None:
            self._writing = self._pool.submit(_write, self._stage, step, files, state, self._keep)

    def check(self) -> None:
        """Raise what has gone wrong since, if anything has."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None or isinstance(error, InterruptedStageError):
            self.wait()  # who is told that a checkpoint was saved must find one


def _write(stage: Stage, step: int, files: dict[str, dict[str, torch.Tensor]], state: str, keep: int) -> None:
    with atomic_directory(stage.folder / checkpoint_name(step)) as folder:
        for name, tensors in files.items():
            save_file(tensors, folder / name)
        (folder / "state.json").write_text(state)
    stage.commit(checkpoint_name(step), rows=step)
    prune_checkpoints(stage, keep)


def _gathered(tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of whole tensors in main memory, one gathered after the other."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.to("cpu", copy=True).contiguous()
    return found


def _row_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """What the student wrote; prompt, prefix and seed follow from the step."""
    return {
        "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
        "tokens": torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int64),
        "logprobs": torch.tensor([p for row in rows for p in row.sampler_logprobs], dtype=torch.float64),
        "truncated": torch.tensor([row.truncated for row in rows], dtype=torch.bool),
    }


def load_rows(folder: Path | None, plans: Sequence[RowPlan]) -> list[Row] | None:
    """The rows of the next step, which was planned as ``plans``; None if the checkpoint has none."""
    if folder is None or not (folder / ROWS).exists():
        return None
    with safe_open(folder / ROWS, framework="pt") as stored:
        lengths, tokens, logprobs, truncated = (
            stored.get_tensor(name) for name in ("lengths", "tokens", "logprobs", "truncated")
        )
    parts = zip(tokens.split(lengths.tolist()), logprobs.split(lengths.tolist()), truncated, strict=True)
    return [
        Row(plan, own.tolist(), own_logprobs.tolist(), bool(cut))
        for plan, (own, own_logprobs, cut) in zip(plans, parts, strict=True)
    ]


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
