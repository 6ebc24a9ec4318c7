"""Commands that make the paper's tables, and the SFT that one of them starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tropd.cli.commands.planning import say_checks
from tropd.cli.options import ForceOption, GpusOption, JsonOption, SetOption, WorkspaceOption, open_workspace
from tropd.cli.render import make_reporter, print_json, print_table, say

if TYPE_CHECKING:
    from tropd.pipeline.experiments.reproduce import Job


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("sft")(sft)
    app.command("reproduce")(reproduce)


def sft(
    workspace: WorkspaceOption,
    base: Annotated[str, typer.Option("--from", help="Model directory or hub name to start from.")],
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a student by fine-tuning on the teacher's trajectories; then set student.model = "sft/train/final"."""
    from tropd.pipeline.experiments.sft import RESULT
    from tropd.pipeline.experiments.sft import sft as stage

    # The prefixes' student does not exist yet: its base model stands in for it.
    run = open_workspace(workspace, [*(settings or []), f'student.model="{base}"'])
    manifest = stage(run, base, force=force)
    if as_json:
        print_json({"stage": "sft", **manifest.summary})
    else:
        say(f'sft: {manifest.summary["steps"]} steps; student.model = "{RESULT}"')


def reproduce(
    table: Annotated[str, typer.Argument(help="table3, table4, table5 or table6.")],
    root: Annotated[Path, typer.Option("--workspace", "-w", help="Directory of the table.", metavar="DIR")],
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same stages with two tiny models: minutes on a laptop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show stages, GPU-hours, disk and checks; make nothing.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per row.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, on a GPU each.")] = 1,
    gpus: GpusOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one of the paper's tables, from downloads to numbers; after a crash, run it again to resume."""
    from tropd.pipeline.config.paper_tables import load_table
    from tropd.pipeline.experiments.reproduce import Job, to_markdown
    from tropd.pipeline.experiments.reproduce import reproduce as make_table
    from tropd.pipeline.run.processes.gpus import number_of_gpus

    loaded = load_table(table, rehearse=rehearse)
    root.mkdir(parents=True, exist_ok=True)
    job = Job(root.resolve(), table, loaded, rehearse, seeds, workers, tuple(settings or ()), gpus or 1)
    if dry_run:
        from tropd.pipeline.training.preflight.preflight import gpus_to_plan

        job = replace(job, gpus=gpus or (1 if rehearse else gpus_to_plan()))
        _show_plan(job, as_json)
        return
    reporter = make_reporter()
    job = replace(job, gpus=number_of_gpus(gpus, "auto", reporter))
    _refuse_impossible(job)
    result = make_table(job, reporter)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        say(to_markdown(result))
        say(f"table: {root / f'{table}.md'}")


def _refuse_impossible(job: Job) -> None:
    from tropd.pipeline.experiments.dry_run import plan_table
    from tropd.pipeline.training.preflight.checks import refuse_plan

    refuse_plan((check for plan in plan_table(job, runs_here=True) for check in plan.checks), "this table")


def _show_plan(job: Job, as_json: bool) -> None:
    from dataclasses import asdict

    from tropd.pipeline.experiments.dry_run import plan_table

    plans = list(plan_table(job))
    if as_json:
        print_json([asdict(plan) for plan in plans])
    else:
        for plan in plans:
            say(f"\n{plan.title}")
            rows = [
                (
                    stage.what,
                    f"{stage.gpu_hours:,.1f}",
                    "" if stage.step_seconds is None else f"{stage.step_seconds:,.0f}",
                    f"{stage.disk_bytes / 1e9:,.1f}",
                    stage.command,
                )
                for stage in plan.stages
            ]
            print_table(("stage", "GPU-hours", "s per step", "disk GB", "command"), rows)
            say(f"downloads: {plan.download_bytes / 1e9:,.1f} GB of models")
            say_checks(plan.checks)
        total = sum(s.gpu_hours for plan in plans for s in plan.stages)
        say(
            f"\nin all about {total:,.0f} GPU-hours on {job.gpus} H100, if every response has full length: predicted "
            "from rates, not measured (docs/scale.md)"
        )
    if any(check.holds is False for plan in plans for check in plan.checks):
        raise typer.Exit(2)
