"""Options that several commands share, and opening a run from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tropd.pipeline.context import Run

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


def open_run(workspace: Path, assignments: list[str] | None) -> Run:
    """The run in a workspace, with progress shown on this terminal."""
    from tropd.cli.render import make_reporter
    from tropd.pipeline.configuration import load_config
    from tropd.pipeline.context import Run
    from tropd.storage.workspace import Workspace

    opened = Workspace.open(workspace)
    given = tuple(assignments or ())
    return Run(opened, load_config(opened.config_path, given), make_reporter(), given)
