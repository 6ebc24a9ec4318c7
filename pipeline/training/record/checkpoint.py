"""Checkpoints: weights and optimizer state as safetensors, the rest as JSON; atomic, resumed bit for bit.

Random numbers, data order, learning rate and guidance are functions of the step, so the step is all their state; rows
that older weights have rolled out for the next step are kept with it. A copy of the state is written in a thread,
while training continues. Each process writes its own part of sharded tensors; a run may resume with another number.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tropd.pipeline.models.engines.base import IdTable
from tropd.pipeline.training.record.sharded_tensors import copied, load_tensors, save_tensors, stored_tensors
from tropd.pipeline.training.rollout.choosing import all_chosen_ids
from tropd.pipeline.training.rollout.rows import Row, RowPlan, mu_logprobs, sampler_logprobs
from tropd.pipeline.training.world import ALONE, World
from tropd.storage.disk.aside import aside_folder, set_aside
from tropd.storage.disk.atomic import atomic_directory, explain_disk_errors
from tropd.storage.errors import DamagedShardError, InterruptedStageError, TropdError
from tropd.storage.stage.fingerprint import Scalar
from tropd.storage.stage.manifest import CHECKPOINTS as FOLDER
from tropd.storage.stage.manifest import FILE_NAME as MANIFEST
from tropd.storage.stage.manifest import check_shard
from tropd.storage.stage.stage import Stage

logger = logging.getLogger(__name__)

TENSORS, ROWS, STATE = "tensors", "rows.safetensors", "state.json"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps, relative to the stage folder."""
    return f"{FOLDER}/step-{step:06d}"


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; the block's end waits for the last.

    Args:
        stage: None in all processes but the first.
        keep: newest checkpoints that are not deleted.
        world: the processes that train together; all must make a writer, and save at the same steps.
    """

    def __init__(self, stage: Stage | None, keep: int, world: World = ALONE) -> None:
        self._stage = stage
        self._keep = keep
        self._world = world.aside()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: Any,
        optimizer: torch.optim.Optimizer,
        counters: dict[str, Any],
        rows: Sequence[Row] | None = None,
        also: Mapping[str, torch.Tensor] = {},
        settings: Mapping[str, Scalar] = {},
    ) -> None:
        """Copy the state after ``step`` steps; write it, commit it, then delete the oldest.

        Args:
            counters: JSON-serializable sums over the run so far.
            rows: those of the next step, where they are rolled out already.
            also: tensors of others that change with the student, by their names in the checkpoint.
            settings: those that the steps were made with and no fingerprint has (see ``settings_of``).

        Raises:
            DiskError: the checkpoint before this one could not be written.
        """
        self.wait()
        tensors = copied(_model_tensors(model) | _optimizer_tensors(model, optimizer) | dict(also))
        state = json.dumps({"step": step, "counters": counters, "settings": dict(settings)}, sort_keys=True)
        own = None if rows is None else row_tensors(rows)
        self._writing = self._pool.submit(self._write, step, tensors, state, own)

    def _write(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: str,
        rows: dict[str, torch.Tensor] | None,
    ) -> None:
        if self._stage is None:
            folder = self._world.tell(Path())
            with explain_disk_errors(folder):
                save_tensors(folder, tensors, self._world.group)
            return
        with atomic_directory(self._stage.folder / checkpoint_name(step)) as folder:
            save_tensors(self._world.tell(folder / TENSORS), tensors, self._world.group)
            if rows is not None:
                save_file(rows, folder / ROWS)
            (folder / STATE).write_text(state)
        self._stage.commit(checkpoint_name(step), rows=step)
        prune_checkpoints(self._stage, self._keep)

    def check(self) -> None:
        """Raise the error of a write that has failed since, if one has."""
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
            self.wait()  # the message claims a checkpoint exists, so wait until it does


def row_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The student's responses; prompt, prefix and seed follow from the step."""
    tensors = {
        "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
        "tokens": torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int64),
        "logprobs": torch.from_numpy(sampler_logprobs(rows)),
        "truncated": torch.tensor([row.truncated for row in rows], dtype=torch.bool),
    }
    if any(row.drawn_logprobs is not None for row in rows):
        tensors["drawn"] = torch.from_numpy(mu_logprobs(rows))
    if any(row.chosen_ids is not None for row in rows):
        tensors["chosen_ids"] = torch.from_numpy(all_chosen_ids(rows))
    if any(row.reward is not None for row in rows):
        rewards = [math.nan if row.reward is None else row.reward for row in rows]
        tensors["rewards"] = torch.tensor(rewards, dtype=torch.float64)
    if any(row.token_rewards is not None for row in rows):
        each = [one for row in rows for one in row.token_rewards or [math.nan] * len(row.tokens)]
        tensors["token_rewards"] = torch.tensor(each, dtype=torch.float64)
    return tensors


def load_rows(folder: Path | None, plans: Sequence[RowPlan]) -> list[Row] | None:
    """The rows of the next step, which was planned as ``plans``; None if the checkpoint has none."""
    if folder is None or not (folder / ROWS).exists():
        return None
    with safe_open(folder / ROWS, framework="pt") as stored:
        kept = {name: stored.get_tensor(name) for name in set(stored.keys())}
    lengths = kept["lengths"].tolist()

    def of_tokens(name: str) -> list[list[Any] | None]:
        return (
            [part.tolist() for part in kept[name].split(lengths)] if name in kept else [None] * len(lengths)
        )

    chosen: Sequence[IdTable | None] = [None] * len(lengths)
    if "chosen_ids" in kept:
        chosen = [part.numpy() for part in kept["chosen_ids"].split(lengths)]
    rewards = kept["rewards"].tolist() if "rewards" in kept else [math.nan] * len(lengths)
    columns = zip(
        plans,
        of_tokens("tokens"),
        of_tokens("logprobs"),
        kept["truncated"].tolist(),
        of_tokens("drawn"),
        chosen,
        rewards,
        of_tokens("token_rewards"),
        strict=True,
    )
    return [
        Row(
            plan,
            tokens or [],
            logprobs or [],
            cut,
            drawn,
            ids,
            None if math.isnan(reward) else reward,
            None if math.isnan(reward) else each,
        )
        for plan, tokens, logprobs, cut, drawn, ids, reward, each in columns
    ]


def _trained(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that training changes: with adapters, these only."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _model_tensors(model: Any) -> dict[str, torch.Tensor]:
    buffers = {name for name, _ in model.named_buffers()}
    saved = {name: value for name, value in model.state_dict().items() if name in buffers}
    return {f"model.{name}": value for name, value in (_trained(model) | saved).items()}


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{kind}": value
        for name, parameter in _trained(model).items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def prune_checkpoints(stage: Stage, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for name in _checkpoints(stage)[:-keep]:
        stage.retire(name)
        shutil.rmtree(stage.folder / name)


def newest_checkpoint(stage: Stage) -> Path | None:
    """The newest checkpoint that matches its checksum; damaged ones after it are set aside. None without any.

    Raises:
        DamagedShardError: checkpoints exist, but none is whole: a restart from the first step is not what anybody
            expects of a run that has some.
    """
    problems = {name: "missing or truncated" for name in stage.broken if name.startswith(f"{FOLDER}/")}
    for name in reversed(_checkpoints(stage)):
        try:
            check_shard(stage.folder, stage.manifest.shards[name])
        except DamagedShardError as error:
            problems[name] = str(error)
            continue
        for lost in problems:
            stage.retire(lost)
            set_aside(stage.folder, lost)
        if problems:
            where = aside_folder(stage.folder)
            logger.warning("resuming from %s; damaged (see %s): %s", name, where, "; ".join(problems))
        return stage.folder / name
    if problems:
        lines = "\n".join(f"    {name}: {problem}" for name, problem in sorted(problems.items()))
        raise DamagedShardError(
            f"{stage.folder} has no whole checkpoint to resume from:\n{lines}",
            hint="put the files back, or start over with --force (the old output is moved aside, not deleted)",
        )
    return None


def load_checkpoint(
    folder: Path | None,
    model: Any,
    optimizer: torch.optim.Optimizer,
    also: Mapping[str, torch.Tensor] = {},
) -> tuple[int, dict[str, Any]]:
    """Restore a checkpoint in place; returns the steps done and the counters. Without one, step 0.

    Args:
        also: tensors that were saved as ``also``.
    """
    if folder is None:
        return 0, {}
    if not (folder / TENSORS).is_dir():
        raise TropdError(
            f"{folder} was written by an earlier version of tropd",
            hint="finish the run with that version, or start over with --force (the old output is moved aside)",
        )
    tensors, parameters = _model_tensors(model) | dict(also), _trained(model)
    for key, (shape, dtype) in stored_tensors(folder / TENSORS).items():
        if key.startswith("optimizer."):
            # AdamW makes its state in its first step: until then none exists to fill.
            name, kind = key.removeprefix("optimizer.").rsplit(".", 1)
            place = parameters[name].device if optimizer.defaults.get("fused") else "cpu"
            number = torch.zeros((), dtype=dtype, device=place)
            like = torch.zeros_like(parameters[name]) if shape else number
            optimizer.state[parameters[name]][kind] = tensors[key] = like
    load_tensors(folder / TENSORS, tensors)
    saved = json.loads((folder / STATE).read_text())
    return int(saved["step"]), dict(saved["counters"])


def settings_of(folder: Path | None) -> dict[str, Scalar]:
    """The settings that a checkpoint was saved with; none without one, or in one of an earlier version."""
    return {} if folder is None else dict(json.loads((folder / STATE).read_text()).get("settings", {}))


def _checkpoints(stage: Stage) -> list[str]:
    """Committed checkpoints, oldest first."""
    return sorted(name for name in stage.manifest.shards if name.startswith(f"{FOLDER}/"))


def remove_uncommitted(stage: Stage) -> list[Path]:
    """Clear away checkpoint folders that a killed run left without an entry in the manifest.

    Older ones than the manifest's are those that it was deleting; a newer one was about to be committed, and is set
    aside. Returns where these are now.

    Raises:
        DamagedShardError: several newer ones exist, which no kill leaves: the manifest is an older version.
    """
    committed = _checkpoints(stage)
    folder = stage.folder / FOLDER
    found = sorted(f"{FOLDER}/{path.name}" for path in folder.iterdir()) if folder.is_dir() else []
    newer = [name for name in found if not committed or name > committed[-1]]
    if len(newer) > 1:
        raise DamagedShardError(
            f"{stage.folder / MANIFEST} is older than the checkpoints beside it: it does not list {', '.join(newer)}",
            hint="put the newest version of it back, or start over with --force (the old output is moved aside, not "
            "deleted)",
        )
    for name in found:
        if name not in committed and name not in newer:
            shutil.rmtree(stage.folder / name)
    return [aside for name in newer if (aside := set_aside(stage.folder, name)) is not None]
