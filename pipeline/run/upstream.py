"""The stages that a stage builds on: their manifests, or the command that makes them."""

from __future__ import annotations

from tropd.pipeline.run.run import Run
from tropd.storage.errors import DamagedShardError, TropdError
from tropd.storage.stage.manifest import FILE_NAME as MANIFEST
from tropd.storage.stage.manifest import Manifest, holds_output, read_manifest
from tropd.storage.workspace import stage_kind


def finished(run: Run, stage: str) -> Manifest:
    """The manifest of an upstream stage.

    Raises:
        TropdError: it is not complete; the message names the command that makes it.
        DamagedShardError: the manifest is missing while output exists, or is not readable.
    """
    folder, command = run.workspace.stage(stage), run.command(stage_kind(stage).command)
    manifest = read_manifest(folder)
    if manifest is None and holds_output(folder):
        raise DamagedShardError(
            f"{folder / MANIFEST} is missing, and without it the files beside it cannot be used",
            hint=f"put it back from a copy, or make the stage anew: {command} --force",
        )
    if manifest is None:
        raise TropdError(f"stage {stage!r} was not run", hint=command)
    if not manifest.complete:
        so_far = f"{folder / MANIFEST} lists {len(manifest.shards)} shards so far"
        raise TropdError(f"stage {stage!r} is not finished: {so_far}", hint=command)
    return manifest
