"""Options that several commands share, and opening a run from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from tropd.pipeline.run.run import Run
    from tropd.pipeline.stages.shards import Execution

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help="The run's directory.", metavar="DIR", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a configuration field (repeatable).", metavar="SECTION.FIELD=VALUE"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Start the stage over; its old output is moved aside, not deleted.")
]

RepairOption = Annotated[
    bool,
    typer.Option("--repair", help="Set damaged shards aside, so that rerunning the stage makes them again."),
]
SkipBadOption = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave out prompts that cannot be used and list them in rejects/ (data.skip_bad)."
    ),
]
ShardsOption = Annotated[
    str | None,
    typer.Option(
        "--shards",
        help="Run only part i of n (one job of an array job). The last part to finish completes the stage.",
        metavar="I/N",
    ),
]
ExecutorOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Make the shards in this process, or with Ray workers.")
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes, each on a GPU of its own (default: the visible ones).",
        metavar="N",
        show_default=False,
    ),
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Ray workers, each with an engine of its own.")]


def execution_of(
    run: Run, shards: str | None, executor: str = "local", workers: int = 1, gpus: int | None = None
) -> Execution:
    """Executor of a stage's shards, from the options.

    Raises:
        ConfigError: options that exclude each other.
    """
    from tropd.pipeline.run.processes.gpus import number_of_gpus
    from tropd.pipeline.stages.shards import Execution, Part
    from tropd.storage.errors import ConfigError

    if gpus is not None and (shards is not None or executor == "ray"):
        raise ConfigError(
            f"--gpus and {'--executor ray' if shards is None else '--shards'} exclude each other",
            hint="one of them splits the work",
        )
    if shards is None and executor == "ray":
        return Execution(ray_workers=workers)
    if shards is None:
        return Execution(gpus=number_of_gpus(gpus, run.config.runtime.device, run.reporter))
    if executor == "ray":
        raise ConfigError("--shards and --executor ray exclude each other", hint="Ray splits the work itself")
    return Execution(part=Part.parse(shards))


def with_skip_bad(settings: list[str] | None, skip_bad: bool) -> list[str]:
    """The overrides, with that of ``--skip-bad``."""
    return [*(settings or []), *(["data.skip_bad=true"] if skip_bad else [])]


def open_workspace(workspace: Path, assignments: list[str] | None) -> Run:
    """The run in a workspace, with progress shown on this terminal."""
    from tropd.cli.render import make_reporter
    from tropd.pipeline.experiments.api import load_run

    return load_run(workspace, tuple(assignments or ()), make_reporter())
