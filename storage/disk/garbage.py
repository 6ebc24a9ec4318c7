"""Removal of a workspace's garbage: leftovers of killed writers and of parts, and output that was moved aside.

Shards, foreign files and logs are never touched. No stage calls this: output that was moved aside (``<stage>.old-<n>``
by ``--force``, ``damaged/`` by repair) stays until a user asks to delete it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tropd.storage.disk.aside import DAMAGED
from tropd.storage.disk.atomic import TEMPORARY_PREFIX, content_size, explain_disk_errors
from tropd.storage.errors import StageLockedError, TropdError
from tropd.storage.stage.job_parts import SUFFIX as PARTS
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.stage.stage import lock_stage
from tropd.storage.workspace import STAGE_NAMES, Workspace

_OLD = re.compile(rf"({'|'.join(STAGE_NAMES)})\.old-\d+")


@dataclass(frozen=True)
class Garbage:
    """One piece of garbage. ``path`` is relative to the workspace."""

    path: str
    bytes: int
    reason: str


def collect_garbage(workspace: Workspace, *, dry_run: bool) -> list[Garbage]:
    """Find garbage and, unless ``dry_run``, delete it. Stages that are being written are left out.

    Raises:
        DiskError: something cannot be deleted.
    """
    found = [
        _entry(workspace, path, reason)
        for path, reason in (*_moved_aside(workspace.root), *_stray(workspace.root))
    ]
    if not dry_run:
        for garbage in found:
            _delete(workspace.root / garbage.path)
    for stage in STAGE_NAMES:
        folder = workspace.stage(stage)
        if not folder.is_dir():
            continue
        try:
            with lock_stage(folder):  # a writer's temporaries are not garbage
                left = [_entry(workspace, path, "left by a killed writer") for path in _temporaries(folder)]
                if not dry_run:
                    for garbage in left:
                        _delete(workspace.root / garbage.path)
                found += left
        except StageLockedError:
            continue
    return sorted(found, key=lambda garbage: garbage.path)


def _moved_aside(root: Path) -> Iterator[tuple[Path, str]]:
    for path in root.iterdir():
        if _OLD.fullmatch(path.name):
            yield path, "moved aside by --force"
        elif path.name == DAMAGED:
            yield path, "set aside by repair"
        elif path.suffix == PARTS and _is_complete(path.with_suffix("")):
            yield path, "parts of a complete stage"


def _is_complete(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except TropdError:
        return False
    return manifest is not None and manifest.complete


def _stray(root: Path) -> Iterator[tuple[Path, str]]:
    """Temporaries outside the stages, whose writers take no lock: only those of dead processes."""
    for folder in (root, root / "data", root / "logs"):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*") if folder.is_dir() else ():
            owner = path.name.removeprefix(TEMPORARY_PREFIX).split("-")[0]
            if not (owner.isdigit() and psutil.pid_exists(int(owner))):
                yield path, "left by a killed writer"


def _temporaries(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith(TEMPORARY_PREFIX):
                yield Path(parent) / name
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]


def _entry(workspace: Workspace, path: Path, reason: str) -> Garbage:
    return Garbage(path.relative_to(workspace.root).as_posix(), content_size(path), reason)


def _delete(path: Path) -> None:
    with explain_disk_errors(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
