"""A run: a workspace with its checked configuration, and the reporter that hears of its progress."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tropd.pipeline.config.resolve import ResolvedConfig
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import TeacherConfig
from tropd.pipeline.run.automatic import settled
from tropd.pipeline.run.progress import Reporter
from tropd.storage.workspace import Workspace


@dataclass(frozen=True)
class Run:
    """A workspace with its checked configuration, and its reporter."""

    workspace: Workspace
    resolved: ResolvedConfig
    reporter: Reporter
    assignments: tuple[str, ...] = ()
    """The ``--set`` overrides that the configuration was read with, to pass on to processes started for the run."""

    @cached_property
    def config(self) -> Config:
        """The checked configuration, with automatic settings decided (see ``automatic``)."""
        return settled(self.workspace, self.resolved.config, self.resolved.origins)

    @property
    def timings(self) -> Path:
        """Log of the stages' times."""
        return self.workspace.logs / "stages.jsonl"

    def command(self, name: str) -> str:
        """The command line that runs ``name`` (options may follow it) on this run, as one would type it."""
        overrides = [part for assignment in self.assignments for part in ("--set", assignment)]
        return " ".join([self.workspace.command(name), *map(shlex.quote, overrides)])


def with_teacher(run: Run, url: str) -> Run:
    """The run with its teacher at a service that already runs."""
    return _with(run, run.config.teacher.model_copy(update={"url": url}))


def as_scorer(run: Run) -> Run:
    """The run with its teachers' scoring engines as their engines: for code that only scores with them."""
    teacher = run.config.teacher
    by_domain = tuple(own.model_copy(update={"engine": own.scorer}) for own in teacher.by_domain)
    return _with(run, teacher.model_copy(update={"engine": teacher.scorer, "by_domain": by_domain}))


def _with(run: Run, teacher: TeacherConfig) -> Run:
    config = run.config.model_copy(update={"teacher": teacher})
    return replace(run, resolved=replace(run.resolved, config=config))
