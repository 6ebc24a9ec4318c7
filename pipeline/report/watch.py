"""State of a training run, from its files alone: it may run in another process, or on another machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tropd.pipeline.config.resolve import load_config
from tropd.pipeline.report.data.facts import Verdict
from tropd.pipeline.report.verdicts.training_verdicts import columns_of, training_verdicts
from tropd.storage.errors import TropdError
from tropd.storage.formats.step_log import read_log
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import METRICS, Workspace

STAGE = "train"
# Steps take from milliseconds to many minutes: a run is called silent after so many times its usual step, at least.
SILENT_STEPS, SILENT_SECONDS = 20.0, 60.0

WatchState = Literal["not started", "starting", "running", "silent", "finished"]


@dataclass(frozen=True)
class TrainingProgress:
    """A training run as its files have it."""

    title: str
    state: WatchState
    records: Sequence[Mapping[str, Any]]
    """Metrics per step, oldest first."""
    total: int
    """Planned steps."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted path that it runs with."""

    @property
    def done(self) -> int:
        return int(self.records[-1]["step"]) + 1 if self.records else 0

    @property
    def verdicts(self) -> list[Verdict]:
        """Verdicts on the steps so far."""
        return training_verdicts(columns_of(self.records), self.settings)


def training_progress(workspace: Workspace) -> TrainingProgress:
    """Read the state of training.

    Raises:
        TropdError: nothing was ever trained in the workspace, or its configuration or manifest is damaged.
    """
    config = load_config(workspace.config_path, ()).config
    folder = workspace.stage(STAGE)
    manifest = read_manifest(folder)
    if manifest is None:
        raise TropdError(
            f"{workspace.root}: no training has begun here", hint=f"{workspace.command('train')} begins it"
        )
    # Settings given with --set when it was started are in the manifest, not in config.toml.
    fields = manifest.fields
    total = int(fields.get("train.steps") or config.train.steps)
    name = fields.get("objective.name") or config.objective.name
    seed = fields.get("run.seed", config.run.seed)
    records = read_log(folder / METRICS).whole
    state: WatchState = "starting"
    if manifest.complete:
        state = "finished"
    elif records:
        state = "silent" if _is_silent(folder / METRICS, records) else "running"
    return TrainingProgress(f"{workspace.root.name} · {name} · seed {seed}", state, records, total, fields)


def _is_silent(path: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    usual = float(records[-1].get("time_total") or 0.0)
    return time.time() - path.stat().st_mtime > max(SILENT_SECONDS, SILENT_STEPS * usual)
