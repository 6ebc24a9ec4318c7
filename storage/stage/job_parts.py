"""Stages that several jobs make at once: each has a folder and manifest of its own, gathered into the stage.

``<stage>.parts/<i>-of-<n>/`` is written by job i alone, so that no manifest ever has two writers. The job that
finds nothing missing moves the shards into the stage, under the stage's lock and with every checksum checked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tropd.storage.disk.atomic import explain_disk_errors, fsync_path, make_folder
from tropd.storage.errors import StageLockedError
from tropd.storage.stage.manifest import Manifest, Shard, check_shard, read_manifest
from tropd.storage.stage.stage import Stage, lock_stage

SUFFIX = ".parts"


def parts_folder(stage_folder: Path) -> Path:
    """Folder that holds the jobs' parts, beside the stage."""
    return stage_folder.with_name(f"{stage_folder.name}{SUFFIX}")


def part_folder(stage_folder: Path, index: int, count: int) -> Path:
    """Folder of the part of job ``index`` of ``count``."""
    return parts_folder(stage_folder) / f"{index}-of-{count}"


def part_manifests(stage_folder: Path, fingerprint: str) -> Iterator[tuple[Path, Manifest]]:
    """The parts made with a fingerprint, in the order of their names, whatever n they were started with."""
    parts = parts_folder(stage_folder)
    for folder in sorted(parts.iterdir()) if parts.is_dir() else ():
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None and manifest.fingerprint == fingerprint:
            yield folder, manifest


def made_shards(stage_folder: Path, fingerprint: str, *, but: Path | None = None) -> set[str]:
    """Names of all shards that the stage or any of its parts (``but`` that one) has."""
    made: set[str] = set()
    whole = read_manifest(stage_folder)
    if whole is not None and whole.fingerprint == fingerprint:
        made |= set(whole.shards)
    for folder, manifest in part_manifests(stage_folder, fingerprint):
        if folder != but:
            made |= set(manifest.shards)
    return made


def gather(stage: Stage, outputs: Sequence[Sequence[str]]) -> None:
    """Move shards from the parts into the open stage.

    Args:
        outputs: groups of shard names; a group is taken only as a whole, in its order.

    Raises:
        StageLockedError: a part is still being made.
        DamagedShardError: a shard is not what its part's manifest says; it stays where it is.
        DiskError: it cannot be moved.
    """
    for folder, manifest in part_manifests(stage.folder, stage.manifest.fingerprint):
        try:
            with lock_stage(folder):
                for group in outputs:
                    if all(name in manifest.shards for name in group):
                        for name in group:
                            if not stage.has(name):
                                _adopt(stage, folder, manifest.shards[name])
        except StageLockedError as error:
            raise StageLockedError(
                f"part {folder.name} of stage {stage.manifest.stage!r} is still being made",
                hint="wait for it to end, or stop it, and run the stage again",
            ) from error


def _adopt(stage: Stage, folder: Path, shard: Shard) -> None:
    source, target = folder / shard.name, stage.folder / shard.name
    if source.exists():
        check_shard(folder, shard)
        with explain_disk_errors(target):
            if target.is_dir():  # an unlisted leftover, which rename would not replace
                shutil.rmtree(target)
            make_folder(target.parent)
            os.replace(source, target)
            fsync_path(target.parent)
    elif not target.exists():
        return  # in neither place: it is made again
    else:
        check_shard(stage.folder, shard)  # moved by a gatherer that was killed before it could say so
    stage.commit(shard.name, shard.rows)


def remove_parts(stage_folder: Path) -> None:
    """Delete the parts of a complete stage, less those that a late job is still writing."""
    parts = parts_folder(stage_folder)
    with explain_disk_errors(parts):
        for folder in sorted(p for p in parts.iterdir() if p.is_dir()) if parts.is_dir() else ():
            try:
                with lock_stage(folder):
                    shutil.rmtree(folder)
            except StageLockedError:
                return
        shutil.rmtree(parts, ignore_errors=True)
