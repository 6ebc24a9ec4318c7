"""The workspace: one directory is one run. This module has the folder and the command of each stage."""

from __future__ import annotations

import datetime
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, WorkspaceVersionError, unknown_name

LAYOUT_VERSION = 1
MARKER = "workspace.json"
TEMPLATE_DATE = "template_date"
Who = Literal["before", "after", "teacher"]
EVALUATED: tuple[Who, ...] = ("before", "after", "teacher")
"""The evaluated models: the student before and after training, and its teacher. Each has files of its own."""
Mode = Literal["greedy", "sampled"]
"""Manner of answering."""
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
"""Logs of the stage ``train``: a record per step, and responses of some steps (see ``step_log``)."""


@dataclass(frozen=True)
class StageKind:
    """A stage: a folder of the workspace, and the command that fills it."""

    name: str
    """Its folder."""
    command: str
    """Words after ``tropd``."""
    scores_of: str | None = None
    """The stage whose trajectories it holds the scores of."""
    listed: bool = True
    """True if ``status`` lists it: not a stage that most runs do without, nor one that counts as a part of another."""
    brought: bool = False
    """True if its files may be the user's own."""
    companions: tuple[str, ...] = ()
    """Patterns of files that no manifest names: logs, which grow, and pages, which are made from everything else."""


STAGES = (
    StageKind("data", "prepare", brought=True, listed=False),
    StageKind("models", "prepare", brought=True),
    StageKind("prefixes", "generate-prefixes"),
    StageKind("scores", "score-teacher", scores_of="prefixes"),
    StageKind("rollouts", "generate-rollouts", listed=False),
    StageKind("rollout-scores", "score-teacher --source rollouts", scores_of="rollouts", listed=False),
    StageKind(
        "train",
        "train",
        companions=(METRICS, SAMPLES, "trace.json", "wandb.json", "tensorboard", "non-finite-step-*.json"),
    ),
    StageKind("eval", "evaluate"),
    StageKind("report", "report", companions=("*",)),
)
"""All stages, in the order of a run."""
STAGE_NAMES = tuple(stage.name for stage in STAGES)
TRAJECTORIES = tuple(stage.scores_of for stage in STAGES if stage.scores_of is not None)
"""Stages that hold trajectories."""
CACHE_STAGES = tuple(s.name for s in STAGES if s.name in TRAJECTORIES or s.scores_of is not None)
"""Trajectories and their scores, which are made once, before training."""


def stage_kind(name: str) -> StageKind:
    """The stage of that name.

    Raises:
        ConfigError: no stage has that name; the message lists all stages.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise unknown_name("stage", name, STAGE_NAMES)


def scores_stage(trajectories: str) -> str:
    """Name of the stage that holds the scores of another one's trajectories.

    Raises:
        ConfigError: that one has no trajectories to score; the message lists the stages that have.
    """
    scores = {stage.scores_of: stage.name for stage in STAGES if stage.scores_of}
    if trajectories not in scores:
        raise unknown_name("stage of trajectories", trajectories, scores)
    return scores[trajectories]


@dataclass(frozen=True)
class Workspace:
    """Paths of a run. Use ``Workspace.create`` and ``Workspace.open``; both check the layout version."""

    root: Path

    @property
    def config_path(self) -> Path:
        return self.root / "config.toml"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def stage(self, name: str) -> Path:
        """Folder of a stage (see ``STAGES``)."""
        return self.root / name

    def resolve(self, path: str) -> Path:
        """An absolute path as it is; a relative one inside the workspace."""
        given = Path(path).expanduser()
        return given if given.is_absolute() else self.root / given

    def command(self, words: str) -> str:
        """A command of ``tropd`` on this workspace, as a person in the current folder would type it."""
        return f"tropd {words} -w {shlex.quote(shown_path(self.root))}"

    def template_date(self) -> datetime.date | None:
        """The date that chat templates write in this workspace, if it was fixed here.

        Raises:
            WorkspaceVersionError: the text written there is not a date.
        """
        kept = self._marker().get(TEMPLATE_DATE)
        try:
            return None if kept is None else datetime.date.fromisoformat(kept)
        except (TypeError, ValueError) as error:
            raise WorkspaceVersionError(
                f"{self.root / MARKER}: {TEMPLATE_DATE} is not a date ({error})",
                hint="write the day on which the first prompts were made, as YYYY-MM-DD, or set data.template_date",
            ) from error

    def keep_template_date(self, date: datetime.date) -> None:
        """Fix the date that chat templates write in this workspace."""
        marker = self._marker() | {TEMPLATE_DATE: date.isoformat()}
        write_text_atomic(self.root / MARKER, json.dumps(marker) + "\n")

    def _marker(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / MARKER).read_text(encoding="utf-8"))
        return found

    @classmethod
    def create(cls, root: Path) -> Workspace:
        """Make the folder and its version marker. Opening an existing workspace is not an error."""
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"cannot make a workspace at {root}: {error.strerror}") from error
        marker = root / MARKER
        if not marker.exists():
            write_text_atomic(marker, json.dumps({"layout": LAYOUT_VERSION}) + "\n")
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> Workspace:
        """Open an existing workspace.

        Raises:
            ConfigError: ``root`` is not a workspace.
            WorkspaceVersionError: it has the layout of another version.
        """
        marker = root / MARKER
        if not marker.is_file():
            raise ConfigError(
                f"{root} is not a tropd workspace (no {MARKER} in it)",
                hint="make one with: "
                f"tropd init {shlex.quote(str(root))} --teacher MODEL --student MODEL --prompts FILE, "
                f"or for the demo: tropd init {shlex.quote(str(root))} --recipe demo",
            )
        try:
            layout = json.loads(marker.read_text(encoding="utf-8"))["layout"]
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceVersionError(
                f"{marker} is not readable as a workspace marker ({error})",
                hint=f'restore it, or write {{"layout": {LAYOUT_VERSION}}} into it if nothing else was touched',
            ) from error
        if layout != LAYOUT_VERSION:
            raise WorkspaceVersionError(
                f"{root} has workspace layout {layout}; this tropd reads and writes layout {LAYOUT_VERSION}",
                hint="use the tropd version that made it, or start a new workspace",
            )
        return cls(root.resolve())


def shown_path(path: Path) -> str:
    """Relative to the current folder, if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # OSError: the current folder was deleted
        return str(path)
