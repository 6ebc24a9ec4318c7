"""The journal of a run: metrics, sampled responses, curves elsewhere, the screen.

One process writes. The others have a journal that keeps nothing, so that the loop need not know which of them it is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tropd.pipeline.config.schema import to_plain
from tropd.pipeline.run.progress import Steps
from tropd.pipeline.training.record.acceptance_samples import write_sample
from tropd.pipeline.training.record.step_metrics import MetricsLog
from tropd.pipeline.training.record.trace import FILE_NAME as TRACE
from tropd.pipeline.training.record.wandb_log import Log, open_wandb, wandb_identity
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.update.gradients import StepInputs
from tropd.storage.formats.samples_file import resume_samples
from tropd.storage.formats.step_log import StepRecord
from tropd.storage.stage.stage import Stage


class Journal(Protocol):
    """Keeps the records of a training run."""

    @property
    def trace(self) -> Path | None:
        """The file for a trace of the run's time, where one is wanted."""

    def sample(self, step: int, inputs: StepInputs) -> None:
        """Keep some of a step's responses, token by token."""

    def write(self, record: StepRecord) -> None:
        """Keep the metrics of a step."""

    def sync(self) -> None:
        """Have everything on disk, so that a checkpoint never is ahead of the metrics."""


@dataclass(frozen=True)
class KeptJournal:
    """The journal of the process that writes."""

    session: Session
    stage: Stage
    metrics: MetricsLog
    curves: Log
    shown: Steps

    @property
    def trace(self) -> Path | None:
        return self.stage.folder / TRACE if self.session.run.config.train.trace else None

    def sample(self, step: int, inputs: StepInputs) -> None:
        steps, tokenizer = self.session.run.config.train.steps, self.session.student.tokenizer
        write_sample(self.stage.folder, step, steps, inputs, self.session.inputs.prompts, tokenizer)

    def write(self, record: StepRecord) -> None:
        self.metrics.write(record)
        self.curves(record)
        self.shown.step(record)

    def sync(self) -> None:
        self.metrics.sync()


class NoJournal:
    """The journal of every other process."""

    trace = None

    def sample(self, step: int, inputs: StepInputs) -> None:
        pass

    def write(self, record: StepRecord) -> None:
        pass

    def sync(self) -> None:
        pass


@contextmanager
def open_journal(session: Session, stage: Stage | None, first_step: int) -> Iterator[Journal]:
    """Resume the records of a run at ``first_step``; records that a lost run wrote from there on are dropped."""
    if stage is None:
        yield NoJournal()
        return
    run, config = session.run, session.run.config.train
    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsLog(stage.folder, first_step))
        for lost in (metrics.lost, resume_samples(stage.folder, first_step, config.steps)):
            if lost:
                run.reporter.warning(f"train: {lost}")
        project = config.wandb_project
        identity = wandb_identity(stage.folder) if project is not None else ""
        curves = stack.enter_context(
            open_wandb(project, run.workspace.root.name, identity, to_plain(run.config), run.workspace.logs)
        )
        title = f"{run.workspace.root.name} · {run.config.objective.name} · seed {run.config.run.seed}"
        shown = stack.enter_context(
            run.reporter.training(title, config.steps, metrics.earlier, stage.manifest.fields)
        )
        yield KeptJournal(session, stage, metrics, curves, shown)
