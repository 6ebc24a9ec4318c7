"""Commands on the teacher cache itself, and for cleaning up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tropd.cli.commands.inspection import verify_stages
from tropd.cli.options import JsonOption, RepairOption, WorkspaceOption
from tropd.cli.render import print_json, print_table, say

cache_app = typer.Typer(
    help="The teacher's cached scores: statistics, checks, export, merging.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(cache_app, name="cache")
    app.command("gc")(collect)


@cache_app.command("stats")
def stats(workspace: WorkspaceOption, as_json: JsonOption = False) -> None:
    """Tokens, bytes per token, kept mass, alternatives per token, teacher entropy."""
    from tropd.storage.cache.tools import cache_stats
    from tropd.storage.workspace import Workspace

    found = cache_stats(Workspace.open(workspace))
    if as_json:
        print_json(vars(found))
        return
    shown = {name: value for name, value in vars(found).items() if not isinstance(value, dict)}
    print_table(
        ("what", "value"), [(name.replace("_", " "), f"{value:,.6g}") for name, value in shown.items()]
    )
    print_table(("alternatives", "tokens"), sorted(found.alternatives_histogram.items()))


@cache_app.command("export")
def export(
    workspace: WorkspaceOption,
    out: Annotated[Path, typer.Argument(help="File (parquet) or directory (datasets) to write.")],
    kind: Annotated[
        Literal["parquet", "datasets"],
        typer.Option("--format", help="One Parquet file, or a Hugging Face datasets directory."),
    ] = "parquet",
) -> None:
    """Write trajectories and scores as one table with list columns."""
    from tropd.storage.cache.tools import export_datasets, export_parquet
    from tropd.storage.workspace import Workspace

    write = export_parquet if kind == "parquet" else export_datasets
    rows = write(Workspace.open(workspace), out)
    say(f"wrote {rows} rows to {out}")


@cache_app.command("verify")
def verify(workspace: WorkspaceOption, repair: RepairOption = False, as_json: JsonOption = False) -> None:
    """Check the cache and the trajectories that it scores, as tropd verify does; exit 1 if anything is wrong."""
    from tropd.storage.workspace import CACHE_STAGES

    verify_stages(workspace, CACHE_STAGES, repair, as_json)


@cache_app.command("merge")
def merge(
    workspace: WorkspaceOption,
    sources: Annotated[
        list[Path], typer.Argument(help="Workspaces to copy score shards from.", metavar="DIR")
    ],
) -> None:
    """Copy score shards that this workspace lacks from others with the same fingerprint."""
    from tropd.storage.cache.tools import merge_caches
    from tropd.storage.workspace import Workspace

    manifest = merge_caches([Workspace.open(s) for s in sources], Workspace.open(workspace))
    state = "complete" if manifest.complete else "not complete; tropd score-teacher scores the rest"
    say(f"{len(manifest.shards)} shards, {state}")


def collect(
    workspace: WorkspaceOption,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them; otherwise they are only listed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List (or delete) leftovers of interrupted writers, --force and --repair."""
    from tropd.storage.disk.garbage import collect_garbage
    from tropd.storage.workspace import Workspace

    found = collect_garbage(Workspace.open(workspace), dry_run=not delete)
    if as_json:
        print_json([vars(g) for g in found])
    elif not found:
        say("nothing to clean up")
    else:
        print_table(("path", "bytes", "reason"), [(g.path, g.bytes, g.reason) for g in found])
        say("deleted" if delete else "nothing was deleted; --delete deletes these")
