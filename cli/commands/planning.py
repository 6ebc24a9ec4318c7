"""The command that plans a run, and the showing of checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tropd.cli.options import JsonOption, SetOption, WorkspaceOption, open_workspace
from tropd.cli.render import print_json, print_table, say
from tropd.pipeline.report.page.formats import human_bytes

if TYPE_CHECKING:
    from tropd.pipeline.training.preflight.checks import Check
    from tropd.pipeline.training.preflight.step_time import StepTime

MARKS = {True: "ok", False: "NO", None: "not checked"}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("plan")(plan)


def say_checks(checks: Iterable[Check]) -> None:
    """A line for each check."""
    for check in checks:
        say(f"  {MARKS[check.holds]:>11}: {check.what}")


def plan(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train together, one per GPU; all visible if not given."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GB per GPU, of another machine than this one.", min=0.1)
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Load the models for a short measurement, and estimate times too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate training's memory, disk and time from the models' configurations, and check them; exit 2 if something says
    no. With --time, also measure the stages' durations."""
    from tropd.pipeline.training.memory_plan import peak_bytes, prompt_tokens
    from tropd.pipeline.training.preflight.preflight import plan_run, visible_gpus
    from tropd.pipeline.training.time_plan import estimate, rounded_duration
    from tropd.storage.errors import TropdError

    run = open_workspace(workspace, settings)
    gpus = gpus or visible_gpus(run)
    unread = ""
    try:
        prompts = prompt_tokens(run)
    except TropdError as error:  # which the checks say, too, if it is more than a missing network
        prompts, unread = [], error.message
    gpu_bytes = None if gpu_memory is None else gpu_memory * 1e9
    found = plan_run(run, gpus, gpu_bytes=gpu_bytes, prompts=prompts)
    total = max((peak_bytes(parts) for parts in found.memory.values()), default=None)
    seconds = {}
    if time:
        with run.reporter.waiting("measuring: the teacher answers a few prompts, the student trains once"):
            seconds = estimate(run, prompts)
    if as_json:
        first = next(iter(found.memory.values()), [])
        shown: dict[str, object] = {
            "memory": {p.name: p.bytes for p in first},
            "total": total,
            "disk": found.disk,
        }
        shown |= {"checks": [{"holds": check.holds, "what": check.what} for check in found.checks]}
        if found.step is not None:
            shown |= {"step": asdict(found.step) | {"total": found.step.total}}
        print_json(shown | ({"seconds": seconds} if time else {}))
    else:
        for where, parts in found.memory.items():
            rows = [
                (p.name, human_bytes(p.bytes), p.phase or "always", p.smaller)
                for p in sorted(parts, key=lambda p: -p.bytes)
            ]
            last = ("at most, in one phase of a step", human_bytes(peak_bytes(parts)), "", "")
            print_table((f"{where}, of {gpus}", "memory", "phase", "smaller with"), [*rows, last])
        print_table(
            ("on disk, at most", "size"), [(name, human_bytes(size)) for name, size in found.disk.items()]
        )
        if found.step is not None:
            print_table(*_predicted(found.step, run.config.train.steps, gpus))
        if seconds:
            times = [(name, rounded_duration(value)) for name, value in seconds.items()]
            print_table(("estimated from a measurement", "time"), times)
        if unread:
            say(f"not checked: lengths of prompts: {unread}")
        say_checks(found.checks)
    if any(check.holds is False for check in found.checks):
        raise typer.Exit(2)


def _predicted(step: StepTime, steps: int, gpus: int) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Columns and rows of a step's predicted seconds."""
    phases = {
        "rollout": step.rollout,
        "teacher, after it": step.teacher,
        "train": step.train,
        "rest": step.rest,
    }
    rows = [(name, f"{value:,.0f} s") for name, value in phases.items()]
    rows += [("a step", f"{step.total:,.0f} s"), ("GPUs occupied", f"{step.busy:.0%}")]
    hours = step.gpu_hours(steps, gpus)
    return ("predicted, responses of full length", "H100"), [
        *rows,
        (f"{steps} steps", f"{hours:,.0f} GPU-hours"),
    ]
