"""State of a run: progress, size and time of each stage, and the next command.

Reads files only, loads no model and takes no lock, so it may run beside a running stage. Checksums are left
to ``tropd verify``: here a shard counts as damaged when it is missing or has another size than promised.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tropd.pipeline.config.resolve import load_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.objectives.needs import needed_data
from tropd.storage.disk.atomic import content_size
from tropd.storage.errors import TropdError
from tropd.storage.formats.step_log import read_log
from tropd.storage.stage.manifest import (
    CHECKPOINTS,
    FILE_NAME,
    Manifest,
    broken_shards,
    can_go_on,
    holds_output,
    read_manifest,
)
from tropd.storage.stage.stage import stage_seconds
from tropd.storage.workspace import (
    CACHE_STAGES,
    EVALUATED,
    METRICS,
    STAGES,
    Workspace,
    shown_path,
    stage_kind,
)

StageState = Literal["not started", "in progress", "complete", "damaged"]

DATA_STAGE = "data"
"""`prepare` fills this folder too; it counts as part of the stage ``models``."""


class StageStatus(BaseModel):
    """One stage as it is on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Folder in the workspace."""
    command: str
    """The command that fills it."""
    state: StageState
    done: int | None = None
    total: int | None = None
    unit: str = ""
    """Unit of ``done`` and ``total`` (shards, steps, models); either may be unknown."""
    rows: int = 0
    bytes: int = 0
    """Bytes of everything in the folder, listed in the manifest or not."""
    seconds: float | None = None
    """Time spent, over all sessions; None if there is no record."""
    fingerprint: str | None = None
    problem: str = ""
    """The damaged, stale or differently configured part, in words."""
    saved: int | None = None
    """Steps that the newest checkpoint has: those after it are repeated after a stop. None where all are kept."""
    needed: bool = True
    """False if the run does without: a purely on-policy one trains without prefixes and their scores."""
    lost: bool = False
    """True if rerunning the stage cannot repair it: files are put back, or it is started over."""

    @property
    def progress_text(self) -> str:
        """Progress such as ``step 40 of 100``; empty if nothing is known."""
        if self.done is None:
            return ""
        counted = f"{self.done} of {self.total}" if self.total is not None else f"{self.done}"
        if self.unit != "steps":
            return f"{counted} {self.unit}"
        saved = {None: "", 0: ", none saved yet"}.get(self.saved, f", saved up to step {self.saved}")
        return f"step {counted}{saved}"


class Status(BaseModel):
    """The whole workspace."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workspace: str
    stages: list[StageStatus]
    total_bytes: int
    next_command: str | None
    """The command to run next; None when there is nothing left to do."""
    next_reason: str
    """Reason for that command, in words."""

    def stage(self, name: str) -> StageStatus | None:
        return next((s for s in self.stages if s.name == name), None)


def workspace_status(workspace: Workspace) -> Status:
    """Look at every stage. Damaged files become part of the answer; only an unreadable disk raises."""
    config: Config | None = None
    config_problem = ""
    try:
        config = load_config(workspace.config_path).config
    except (TropdError, OSError, ValueError) as error:
        config_problem = str(error)
    seconds = stage_seconds(workspace.logs / "stages.jsonl")
    stages: list[StageStatus] = []
    for name in (kind.name for kind in STAGES if kind.listed):
        if name == "report":
            stages.append(_report_status(workspace, stages))
        elif name != "models" or _prepares(workspace, config):
            found = _stage_status(workspace, name, config, seconds, stages)
            stages.append(found.model_copy(update={"needed": _is_needed(workspace, found, config)}))
    command, reason = _next(workspace, stages, config_problem)
    return Status(
        workspace=workspace.root.name,
        stages=stages,
        total_bytes=content_size(workspace.root),
        next_command=command,
        next_reason=reason,
    )


def _prepares(workspace: Workspace, config: Config | None) -> bool:
    """True if this run makes its own models (demo recipes), or has done so."""
    return (config is not None and config.demo.enabled) or (workspace.stage("models") / FILE_NAME).exists()


def _is_needed(workspace: Workspace, stage: StageStatus, config: Config | None) -> bool:
    """False for data that was not made, and that the run has trained without or has no use for; a demo shows all."""
    if stage.name not in CACHE_STAGES or stage.state != "not started":
        return True
    trains = (workspace.stage("train") / FILE_NAME).exists()
    made = config is None or config.demo.enabled or stage.name in needed_data(config.objective)
    return made and not trains


def _stage_status(
    workspace: Workspace,
    name: str,
    config: Config | None,
    seconds: Mapping[str, float],
    earlier: list[StageStatus],
) -> StageStatus:
    folder = workspace.stage(name)
    size = content_size(folder)
    command = stage_kind(name).command
    try:
        manifest = read_manifest(folder)
    except (TropdError, OSError) as error:
        return StageStatus(
            name=name,
            command=command,
            state="damaged",
            bytes=size,
            seconds=seconds.get(name),
            problem=str(error).replace(f"{folder}/", ""),
            lost=True,
        )
    if manifest is None:
        if holds_output(folder):
            problem = f"{FILE_NAME} is missing"
            return StageStatus(
                name=name, command=command, state="damaged", bytes=size, problem=problem, lost=True
            )
        return StageStatus(name=name, command=command, state="not started", bytes=size)
    broken = broken_shards(folder, manifest)
    spent = seconds.get(name)
    if name == "models":
        broken |= _broken_data(workspace.stage(DATA_STAGE))
        spent = None if spent is None else spent + seconds.get(DATA_STAGE, 0.0)
    done, total, unit = _progress(workspace, name, manifest, config, earlier)
    state: StageState = "damaged" if broken else "complete" if manifest.complete else "in progress"
    return StageStatus(
        name=name,
        command=command,
        state=state,
        done=done,
        total=total,
        unit=unit,
        rows=done if name == "train" else _rows(manifest),
        bytes=size,
        seconds=spent,
        fingerprint=manifest.fingerprint,
        saved=_saved_steps(manifest, done) if name == "train" else None,
        problem="; ".join(broken.values())
        or (_trial(workspace, manifest, config, total) if name == "train" else ""),
        lost=bool(broken) and not can_go_on(manifest, broken),
    )


def _rows(manifest: Manifest) -> int:
    """Rows of all shards; one that is several files of one stem (arrays beside a table) counts once."""
    rows: dict[str, int] = {}
    for shard in manifest.shards.values():
        stem = shard.name.split(".")[0]
        rows[stem] = max(shard.rows, rows.get(stem, 0))
    return sum(rows.values())


def _broken_data(folder: Path) -> dict[str, str]:
    try:
        manifest = read_manifest(folder)
    except (TropdError, OSError) as error:
        return {FILE_NAME: str(error).replace(f"{folder}/", f"{DATA_STAGE}/")}
    broken = broken_shards(folder, manifest) if manifest else {}
    return {f"{DATA_STAGE}/{name}": f"{DATA_STAGE}/{line}" for name, line in broken.items()}


def _progress(
    workspace: Workspace, name: str, manifest: Manifest, config: Config | None, earlier: list[StageStatus]
) -> tuple[int, int | None, str]:
    """Done, total (if known) and the unit of both."""
    shards = len(manifest.shards)
    if name == "train":
        steps = count_steps(workspace.stage("train") / METRICS)
        return steps, _asked_steps(manifest, config), "steps"
    if name == "eval":
        # A configuration may have got another benchmark since.
        models = _evaluated(manifest, None if manifest.complete else config)
        return models, models if manifest.complete else len(EVALUATED), "models"
    if name == "models":
        return shards, shards if manifest.complete else None, "parts"
    shards = len({shard.split(".")[0] for shard in manifest.shards})
    if manifest.complete:
        return shards, shards, "shards"
    if name == "scores":
        upstream = next((s for s in earlier if s.name == "prefixes" and s.state == "complete"), None)
        return shards, upstream.done if upstream else None, "shards"
    return shards, _prefix_shards(workspace, config), "shards"


def _saved_steps(manifest: Manifest, done: int) -> int | None:
    """Steps of the newest checkpoint, where training goes on from it with fewer than are on record."""
    if manifest.complete:
        return None
    steps = [int(name.rpartition("-")[2]) for name in manifest.shards if name.startswith(f"{CHECKPOINTS}/")]
    saved = max(steps, default=0)
    return saved if saved < done else None


def _evaluated(manifest: Manifest, config: Config | None) -> int:
    """Models with all responses: to the problems, to those of each benchmark, and to each task of lm-eval."""
    files = Counter(Path(name).stem.rpartition("-") for name in manifest.shards)
    sets = len(config.evaluation_sets) if config else 1
    tasks = len(config.evaluation.harness) if config else 0
    return sum(files["part", "-", who] >= sets and files["harness", "-", who] >= tasks for who in EVALUATED)


def _asked_steps(manifest: Manifest, config: Config | None) -> int | None:
    """Steps that training runs for; where it is complete, those that it ran for."""
    asked = manifest.fields.get("train.steps")
    if manifest.complete and isinstance(asked, int):
        return asked
    return config.train.steps if config else None


def _trial(workspace: Workspace, manifest: Manifest, config: Config | None, total: int | None) -> str:
    """A sentence if training is complete for another number of steps than the configuration has, else empty."""
    if config is None or not manifest.complete or total in (None, config.train.steps):
        return ""
    return (
        f"complete for train.steps = {total}, while config.toml says {config.train.steps}: "
        f"{workspace.command('train')} --force trains anew"
    )


def _prefix_shards(workspace: Workspace, config: Config | None) -> int | None:
    """Number of shards that the prefixes will have, from the length of the prompt file."""
    if config is None:
        return None
    try:
        with workspace.resolve(config.data.prompts).open("rb") as stream:
            prompts = sum(1 for line in stream if line.strip())
    except OSError:
        return None
    return math.ceil(min(prompts, config.data.limit or prompts) / config.prefixes.shard_prompts) or None


def count_steps(metrics: Path) -> int:
    """Optimizer steps on record. A step that was repeated after an interruption counts once."""
    try:
        records = read_log(metrics).whole
    except OSError:
        return 0
    return sum(any(not key.startswith(("step", "accuracy_")) for key in record) for record in records)


def _report_status(workspace: Workspace, stages: list[StageStatus]) -> StageStatus:
    """The report is complete while it describes the other stages as they are now.

    Contents are compared, not file times: those do not survive a copy of the workspace.
    """
    folder = workspace.stage("report")
    size = content_size(folder)
    state: StageState = "complete"
    problem = ""
    try:
        written = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]
        seen = {name: (s["state"], s["fingerprint"], s["rows"]) for name, s in written.items()}
        if not (folder / "index.html").is_file():
            state, problem = "damaged", "index.html is missing"
        elif seen != {s.name: (s.state, s.fingerprint, s.rows) for s in stages}:
            state, problem = "in progress", "the report is older than the results"
    except FileNotFoundError:
        state = "not started"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        state, problem = "damaged", f"report.json is not readable ({type(error).__name__})"
    return StageStatus(name="report", command="report", state=state, bytes=size, problem=problem)


def _next(workspace: Workspace, stages: list[StageStatus], config_problem: str) -> tuple[str | None, str]:
    if config_problem:
        return workspace.command("config show"), f"the configuration cannot be read: {config_problem}"
    for stage in stages:
        command = workspace.command(stage.command)
        if stage.state == "complete" or not stage.needed:
            continue
        if stage.state == "not started":
            return command, f"{stage.command} has not been run yet"
        if stage.state == "in progress":
            return command, stage.problem or f"{stage.command} is not finished ({stage.progress_text})"
        if stage.lost:
            return f"{command} --force", f"{stage.problem}: put it back from a copy, or start the stage over"
        return command, f"{stage.problem}: rerun the stage to repair it"
    return None, f"everything is done: open {shown_path(workspace.stage('report') / 'index.html')}"
