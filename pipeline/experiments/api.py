"""The Python door: a run as an object, with the stages, files and refusals of the command line.

    from tropd.pipeline import distill

    run = distill(teacher="Qwen/Qwen3-4B", student="Qwen/Qwen3-0.6B", prompts=questions, workspace="runs/mine")
    run.train()
    run.report()

Everything that decides a result is in the workspace, so that ``tropd … -w runs/mine`` continues such a run, and
``open_run`` one of the command line. An interrupted stage resumes when it is called again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit

from tropd.pipeline.config.keyword_settings import as_assignments, with_settings
from tropd.pipeline.config.problems import unusual
from tropd.pipeline.config.resolve import load_config, parse_config
from tropd.pipeline.problems.given import Given, records, write_records
from tropd.pipeline.run.progress import SILENT, Reporter
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError
from tropd.storage.stage.manifest import Manifest, holds_output
from tropd.storage.workspace import METRICS, Workspace

if TYPE_CHECKING:  # PyTorch is loaded only when a run is made
    import pyarrow as pa

    from tropd.pipeline.run.run import Run
    from tropd.pipeline.stages.shards import Execution

Prompts = str | os.PathLike[str] | Iterable[Given]
"""A file of prompts, or the prompts themselves: texts, conversations (lists of messages), records, a dataset."""
TRAINING_FILE, EVALUATION_FILE = "data/train.jsonl", "data/eval.jsonl"
USERS = {"prompts": ("prefixes", "rollouts", "train"), "evaluation": ("eval",)}
"""Stages that are made of prompts."""
REPORTERS = "tropd.reporters"
MADE_BY = (
    "# Made by tropd.pipeline.distill, which writes this file anew whenever it is called for this workspace.\n"
    "# To edit it, remove these lines; tropd.pipeline.open_run and the command line take it as it is.\n"
)


@dataclass(frozen=True, repr=False)
class Distillation:
    """A run: its stages as methods, each resumable, and its results. Methods return the stage's summary."""

    run: Run

    def __repr__(self) -> str:
        return f"Distillation({str(self.workspace)!r})"

    @property
    def workspace(self) -> Path:
        """Folder of the run."""
        return self.run.workspace.root

    def generate_prefixes(self, *, force: bool = False) -> dict[str, Any]:
        """Stage 1: trajectories of the teacher, from whose beginnings the student continues."""
        from tropd.pipeline.stages.prefixes import generate_prefixes

        self._prepare()
        return dict(generate_prefixes(self.run, force=force).summary)

    def score_teacher(self, *, force: bool = False) -> dict[str, Any]:
        """Stage 2: the teacher's top-k log-probs of its trajectories."""
        from tropd.pipeline.stages.scores import score_teacher

        self.generate_prefixes()
        return dict(score_teacher(self.run, force=force).summary)

    def train(self, *, force: bool = False) -> dict[str, Any]:
        """Distill the student; earlier stages that the objective needs are made first.

        Raises:
            InterruptedStageError: Ctrl-C, or the interrupt of a notebook's kernel; call again to resume.
            TropdError: refusals of the stages, with the remedy in ``hint``.
        """
        from tropd.pipeline.training.loop import train

        self._prepare()
        for stage in stages_before_training(self.run):
            stage()
        return dict(train(self.run, force=force).summary)

    def evaluate(self, *, force: bool = False) -> dict[str, Any]:
        """Student before and after, and teacher, on the problems of ``evaluation``."""
        from tropd.pipeline.stages.evaluation.evaluate import evaluate

        self.train()
        return dict(evaluate(self.run, force=force).summary)

    def report(self) -> Path:
        """Write the page about the run, as far as it is, and return its path."""
        from tropd.pipeline.report.page.page import write_report

        return write_report(self.run.workspace)

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the trained student to a new folder, with a model card; returns the folder."""
        from tropd.pipeline.experiments.export import export_to

        return export_to(self.run, Path(folder).expanduser())

    @property
    def metrics(self) -> pa.Table:
        """Metrics of each training step so far: a column each, null where a step has no such number."""
        import pyarrow as pa

        from tropd.pipeline.report.data.training_metrics import read_metrics

        rows, _ = read_metrics(self.run.workspace.stage("train") / METRICS)
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})

    @property
    def student_path(self) -> Path:
        """Folder of the trained student, a plain Hugging Face model.

        Raises:
            TropdError: training is not finished.
        """
        from tropd.pipeline.run.upstream import finished

        finished(self.run, "train")
        return self.run.workspace.stage("train") / "final"

    def _prepare(self) -> None:
        if self.run.config.demo.enabled:
            from tropd.pipeline.experiments.demo.prepare import prepare

            prepare(self.run)


def stages_before_training(run: Run, execution: Execution | None = None) -> list[Callable[[], Manifest]]:
    """Stages that fill what the run's objective needs before training, in the order to call them. A demo shows all of the
    teacher's."""
    from tropd.pipeline.objectives.needs import needed_data
    from tropd.pipeline.stages.prefixes import generate_prefixes, generate_rollouts
    from tropd.pipeline.stages.scores import score_teacher
    from tropd.pipeline.stages.shards import HERE

    on = HERE if execution is None else execution
    fill: dict[str, Callable[[], Manifest]] = {
        "prefixes": partial(generate_prefixes, run, execution=on),
        "scores": partial(score_teacher, run, execution=on),
        "rollouts": partial(generate_rollouts, run, execution=on),
        "rollout-scores": partial(score_teacher, run, source_stage="rollouts", execution=on),
    }
    needed = {
        *needed_data(run.config.objective),
        *(("prefixes", "scores") if run.config.demo.enabled else ()),
    }
    return [stage for folder, stage in fill.items() if folder in needed]


def distill(
    *,
    teacher: str | os.PathLike[str],
    student: str | os.PathLike[str],
    prompts: Prompts,
    workspace: str | os.PathLike[str],
    evaluation: Prompts | None = None,
    objective: str | Mapping[str, Any] = "tropd",
    reporter: Reporter | None = None,
    **settings: Any,
) -> Distillation:
    """A run that distills ``teacher`` into ``student`` on ``prompts``; its stages run when they are called.

    Called again with the same arguments it is the same run, which resumes where it stopped. With others, a stage that
    was made with the earlier ones refuses and names the differences.

    Args:
        teacher, student: folders of models, or names on the Hugging Face hub.
        prompts, evaluation: files, or prompts as values, which are written to files of the workspace. Prompts to
            evaluate on need answers only for accuracy.
        workspace: folder of the run; made if it is missing.
        objective: a method (``tropd objectives`` lists them), or a dictionary with its ``name`` and changes.
        reporter: receives progress; by default it is shown, in a terminal and in a notebook.
        settings: any other setting of the configuration: ``train={"steps": 20}``, or ``**{"train.steps": 20}``.

    Raises:
        ConfigError: an argument that cannot be used, or a workspace that was not made here.
        DataError: a prompt that cannot be used, or others than the workspace's stages were made with.
    """
    data: dict[str, Any] = {"data": {}}
    given = {"prompts": (prompts, TRAINING_FILE), "evaluation": (evaluation, EVALUATION_FILE)}
    values: dict[str, list[dict[str, Any]]] = {}
    for name, (value, file) in given.items():
        if isinstance(value, str | os.PathLike):
            data["data"][name] = str(Path(value).expanduser().absolute())
        elif value is not None:
            values[name] = records(value, name)
            data["data"][name] = file
    for role, model in {"teacher": teacher, "student": student}.items():
        data[role] = {"model": _model(role, model)}
    data["objective"] = {"name": objective} if isinstance(objective, str) else dict(objective)
    if any(isinstance(record.get("prompt"), list) for record in values.get("prompts", ())):
        data["data"]["chat"] = True  # only a chat template can write conversations
    text = MADE_BY + tomlkit.dumps(with_settings(data, settings))
    parse_config(text, where="the arguments of distill")
    made = Workspace.create(Path(workspace).expanduser())
    _refuse_foreign(made)
    for name, found in values.items():
        used_by = next((made.stage(stage) for stage in USERS[name] if holds_output(made.stage(stage))), None)
        write_records(found, made.root / given[name][1], name, used_by=used_by)
    write_text_atomic(made.config_path, text)
    return open_run(made.root, reporter=reporter)


def open_run(
    workspace: str | os.PathLike[str], *, reporter: Reporter | None = None, **settings: Any
) -> Distillation:
    """The run in an existing workspace.

    Args:
        workspace: folder of the run.
        reporter: as of ``distill``.
        settings: override the workspace's config.toml, as ``--set`` does.

    Raises:
        ConfigError: it is not a workspace, or its configuration cannot be used.
    """
    run = load_run(Path(workspace).expanduser(), as_assignments(settings), reporter or default_reporter())
    return Distillation(run)


def load_run(workspace: Path, assignments: tuple[str, ...], reporter: Reporter) -> Run:
    """The run in a workspace with ``section.field=value`` overrides; unusual settings are reported."""
    from tropd.pipeline.run.run import Run

    opened = Workspace.open(workspace)
    run = Run(opened, load_config(opened.config_path, assignments), reporter, assignments)
    if os.environ.get("RANK", "0") == "0":  # torchrun's first process speaks for all
        for sentence in unusual(run.config, run.resolved.origins):
            reporter.warning(sentence)
    return run


def default_reporter() -> Reporter:
    """The default reporter: one that is registered, as that of tropd.cli; else a silent one."""
    for entry in entry_points(group=REPORTERS):
        reporter: Reporter = entry.load()()
        return reporter
    return SILENT


def _model(role: str, model: Any) -> str:
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"{role} is a {type(model).__name__}; models are given as a folder or a name on the Hugging Face hub: "
            "stages load them themselves, in processes of their own",
            hint=f"model.save_pretrained(folder); tokenizer.save_pretrained(folder); distill({role}=folder, …)",
        )
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() or isinstance(model, os.PathLike) else str(model)


def _refuse_foreign(workspace: Workspace) -> None:
    path = workspace.config_path
    if path.exists() and not path.read_text(encoding="utf-8").startswith(MADE_BY):
        raise ConfigError(
            f"{path} was not made by distill, or was edited since, and is left alone",
            hint=f"tropd.pipeline.open_run({str(workspace.root)!r}) opens the run as it is; or name another workspace",
        )
