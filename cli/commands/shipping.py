"""Commands that ship a run's student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tropd.cli.options import JsonOption, open_workspace
from tropd.cli.render import print_json, say


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export")(export)


def export(
    workspace: Annotated[Path, typer.Argument(help="The run's directory.", metavar="W", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write; must not hold anything yet.", metavar="DIR"),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option(
            "--push",
            help="Repository on the Hugging Face hub; needs HF_TOKEN in the environment.",
            metavar="REPO",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Push to a public repository, not a private one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Export the trained student with a model card: to a folder, or to the Hugging Face hub."""
    from tropd.pipeline.experiments.export import export_to, push
    from tropd.storage.errors import ConfigError

    if (to is None) == (repository is None) or (public and repository is None):
        raise ConfigError(
            "--public belongs to --push"
            if public and repository is None
            else "export takes --to or --push, one of them",
            hint=f"tropd export {workspace} --to DIR writes a folder, --push owner/name uploads it",
        )
    run = open_workspace(workspace, None)
    place = str(export_to(run, to)) if to is not None else push(run, str(repository), public=public)
    if as_json:
        print_json({"exported": place})
    else:
        say(f"exported: {place}")
