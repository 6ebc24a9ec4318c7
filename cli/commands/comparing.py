"""The command that puts methods side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tropd.cli.options import GpusOption, JsonOption, SetOption, WorkspaceOption, open_workspace
from tropd.cli.render import print_json, print_table, say


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare")(compare)


def compare(
    workspace: WorkspaceOption,
    objectives: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas (see tropd objectives); NAME:FIELD=VALUE+FIELD=VALUE is a variant."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, on a GPU each.")] = 1,
    gpus: GpusOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare several methods: same start, same prompts, same prefixes; resumable run by run."""
    from tropd.pipeline.experiments.compare import compare as run_compare
    from tropd.pipeline.report.comparison.comparison import collect_comparison
    from tropd.pipeline.report.comparison.comparison_page import write_comparison
    from tropd.pipeline.run.processes.gpus import number_of_gpus

    run = open_workspace(workspace, settings)
    names = [n.strip() for n in objectives.split(",") if n.strip()]
    on = number_of_gpus(gpus, run.config.runtime.device, run.reporter)
    cells = run_compare(run, names, seeds, workers=workers, gpus=on)
    found = collect_comparison(run.workspace, cells)
    page = write_comparison(run.workspace, found)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return

    def cell(estimate: Any, scale: str = "{:.1f}") -> str:
        low, mean, high = (scale.format(100 * v) for v in (estimate.low, estimate.mean, estimate.high))
        return f"{mean} [{low}, {high}]"

    def distance(estimate: Any) -> str:
        return "" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

    rows = [
        (
            method.objective,
            distance(method.distance.get("reverse_kl")),
            distance(method.distance.get("forward_kl")),
            cell(method.accuracy["greedy"]) if method.accuracy else "",
            cell(method.accuracy["sampled"]) if method.accuracy else "",
            cell(method.difference["sampled"], "{:+.1f}") if method.difference else "",
            method.steps,
            round(method.teacher_tokens_scored),
            round(method.teacher_bytes_received),
        )
        for method in found.methods
    ]
    columns = (
        "method",
        "reverse KL",
        "forward KL",
        "greedy %",
        "sampled %",
        f"sampled − {found.baseline}",
        "steps",
        "teacher tokens",
        "bytes",
    )
    print_table(columns, rows)
    start = [f"{name.replace('_kl', ' KL')} {one.mean:.3f}" for name, one in found.distance_before.items()]
    before = ", ".join([*start, *(f"{mode} {value:.1%}" for mode, value in found.before.items())])
    teacher = ", ".join(f"{mode} {value:.1%}" for mode, value in found.teacher.items())
    beside = f"; teacher: {teacher}" if teacher else ""
    say(f"before: {before}{beside}; 95 % intervals over seeds and problems")
    say(f"page: {page}")
