"""Commands that only read: status, watch, query, verify, doctor, config, objectives."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tropd.cli.options import JsonOption, RepairOption, SetOption, WorkspaceOption, open_workspace
from tropd.cli.render import (
    follow_training,
    make_reporter,
    print_json,
    print_table,
    say,
    stdout,
    tell,
    tell_verdicts,
)
from tropd.pipeline.report.page.formats import human_bytes

if TYPE_CHECKING:
    from tropd.pipeline.experiments.doctor.differences import Difference

config_app = typer.Typer(help="Show and explain the configuration of a run.", no_args_is_help=True)
objectives_app = typer.Typer(help="List the distillation methods and show their formulas.")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("status")(status)
    app.command("watch")(watch)
    app.command("query")(query)
    app.command("verify")(verify)
    app.command("doctor")(doctor)
    app.add_typer(config_app, name="config")
    app.add_typer(objectives_app, name="objectives")


def status(workspace: WorkspaceOption, as_json: JsonOption = False) -> None:
    """Show the stages of a run: state, progress, size, time, and the next command."""
    from tropd.pipeline.report.data.collect import build_report
    from tropd.pipeline.report.status import workspace_status
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    found, verdicts = workspace_status(opened), build_report(opened).verdicts
    if as_json:
        print_json({**found.model_dump(mode="json"), "verdicts": [v.model_dump() for v in verdicts]})
        return
    rows = [
        (
            s.name,
            s.state if s.needed else "not needed",
            s.progress_text,
            human_bytes(s.bytes),
            f"{s.seconds:.1f} s" if s.seconds else "",
        )
        for s in found.stages
    ]
    print_table(("stage", "state", "progress", "size", "time"), rows)
    for stage in found.stages:
        if stage.state == "complete" and stage.problem:
            say(f"{stage.name}: {stage.problem}")
    say(
        f"total {human_bytes(found.total_bytes)}"
        + (f"; next: {found.next_command}" if found.next_command else "")
    )
    tell_verdicts(verdicts)


def watch(workspace: WorkspaceOption, as_json: JsonOption = False) -> None:
    """Follow a training run from its files, wherever it runs; Ctrl-C leaves it alone."""
    from tropd.pipeline.report.watch import training_progress
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    progress = training_progress(opened)
    if as_json:
        last = progress.records[-1] if progress.records else None
        print_json({"state": progress.state, "steps": progress.done, "total": progress.total, "last": last})
    elif stdout.is_terminal:
        follow_training(lambda: training_progress(opened))
    else:
        say(f"{progress.title}: {progress.state}, {progress.done}/{progress.total} steps")


def query(
    workspace: WorkspaceOption,
    sql: Annotated[
        str, typer.Argument(help="A SELECT over prompts, trajectories, tokens, metrics, evaluations.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Query the run's files with SQL (DuckDB, read-only)."""
    from tropd.storage.catalog import run_query
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    with make_reporter().waiting("asking"):
        result = run_query(opened, sql)
    if as_json:
        print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
    else:
        print_table(result.columns, result.rows)


def verify(workspace: WorkspaceOption, repair: RepairOption = False, as_json: JsonOption = False) -> None:
    """Check every stored file against its checksum and every invariant; exit 1 if anything is wrong."""
    from tropd.storage.workspace import STAGE_NAMES

    verify_stages(workspace, STAGE_NAMES, repair, as_json)


def verify_stages(workspace: Path, stages: Collection[str], repair: bool, as_json: bool) -> None:
    """Check some stages and show the findings.

    Raises:
        typer.Exit: with 1 if anything is wrong.
    """
    from tropd.storage.verify.verify import repair as repair_workspace
    from tropd.storage.verify.verify import verify_workspace
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    with make_reporter().waiting("checking every file"):
        findings = verify_workspace(opened, stages)
    if as_json:
        print_json([vars(f) for f in findings])
    else:
        for finding in findings:
            say(str(finding))
        if not findings:
            say("OK: every file matches its manifest")
    errors = [f for f in findings if f.severity == "error"]
    if repair and errors:
        for line in repair_workspace(opened, findings):
            tell(line)
    if errors:
        raise typer.Exit(1)


def doctor(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that the student answers.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Compare sampler, trainer and teacher on the same weights; exit 1 if rounding does not explain the differences."""
    from dataclasses import asdict

    from tropd.pipeline.experiments.doctor.examine import examine

    found = examine(open_workspace(workspace, settings), prompts=prompts, tokens=tokens)
    if as_json:
        differences = [asdict(one) | {"sound": one.sound} for one in found.differences]
        print_json(asdict(found) | {"differences": differences, "sound": not found.advice})
    else:
        say(
            f"{found.prompts} answers, {found.tokens} tokens; student in {found.student_dtype}, teacher in "
            f"{found.teacher_dtype}; nats per token"
        )
        columns = ("compared", "", "mean", "p99", "largest", "importance weights")
        rows = [
            (d.one, d.other, *(_nats(v) for v in (d.mean, d.p99, d.largest)), _weights(d))
            for d in found.differences
        ]
        print_table(columns, rows)
        say(found.meaning)
        for line in found.advice:
            tell(line)
        if not found.advice:
            say("rounding explains every difference")
    if found.advice:
        raise typer.Exit(1)


def _nats(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"


def _weights(found: Difference) -> str:
    if found.lowest_weight is None:
        return "none"
    return f"{found.lowest_weight:.6g} to {found.highest_weight:.6g}"


@config_app.command("show")
def config_show(workspace: WorkspaceOption, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the resolved configuration of a run, as TOML with documentation."""
    from tropd.pipeline.config.resolve import dump_config, load_config
    from tropd.pipeline.config.schema import to_plain
    from tropd.storage.workspace import Workspace

    resolved = load_config(Workspace.open(workspace).config_path, settings or [])
    if as_json:
        print_json(to_plain(resolved.config))
    else:
        say(dump_config(resolved.config), end="")


@config_app.command("explain")
def config_explain(
    field: Annotated[str, typer.Argument(help="A field (train.learning_rate) or section (train).")],
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", "-w", help="A run; otherwise the demo recipe's.", metavar="DIR"),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a field's value, its source and its meaning."""
    from pathlib import Path

    from tropd.pipeline.config.explain import explain
    from tropd.pipeline.config.recipe_files import recipe_text
    from tropd.pipeline.config.resolve import load_config, parse_config
    from tropd.storage.workspace import Workspace

    if workspace is None:
        resolved = parse_config(recipe_text("demo"), settings or [], where="recipe demo")
    else:
        resolved = load_config(Workspace.open(Path(workspace)).config_path, settings or [])
    fields = explain(resolved, field)
    if as_json:
        print_json([vars(f) for f in fields])
        return
    for info in fields:
        say(info.path, style="bold", end="")
        say(f" = {info.value!r}")
        say(f"  from {info.source}; default {info.default!r}; {info.kind}")
        say(f"  {info.documentation}")


@objectives_app.callback(invoke_without_command=True)
def objectives_list(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the methods, each with its needs; --json has their sources too."""
    if context.invoked_subcommand:
        return
    from tropd.pipeline.config.objective_list import list_objectives

    entries = list_objectives()
    if as_json:
        print_json([vars(e) for e in entries])
    else:
        print_table(("name", "method", "needs"), [(e.name, e.title, e.needs) for e in entries])
        say("\nK1: a policy gradient with advantage log pi_T(x) - log pi_S(x) of the student's own token x")
        say("outliers: tokens of the student that the method's partition does not trust")
        say("tropd objectives show NAME prints a method's formula, source, and how sure it is")


@objectives_app.command("show")
def objectives_show(name: str, as_json: JsonOption = False) -> None:
    """Show a method's formula, source, needs and recipe."""
    from tropd.pipeline.config.objective_list import describe_needs
    from tropd.pipeline.config.recipe_files import load_objective, recipe_text
    from tropd.pipeline.config.schema import to_plain
    from tropd.pipeline.objectives.needs import teacher_needs

    objective = load_objective(name)
    if as_json:
        print_json({**to_plain(objective), "teacher_needs": vars(teacher_needs(objective))})
        return
    say(objective.name, style="bold", end="")
    say(f"  {objective.title}")
    say(f"source: {objective.source}\nconfidence: {objective.confidence}")
    say(f"needs: {describe_needs(objective)}\n")
    say(f"{objective.formula.strip()}\n")
    say(f"# recipe\n{recipe_text(name, 'objectives')}", end="")
