"""Setting unusable files aside, under their own names in the workspace's ``damaged/``; nothing is deleted.

``damaged/train/checkpoints/step-000050`` is what was ``train/checkpoints/step-000050``; a second one gets ``.2``.
``tropd gc`` names all of it, and deletes it when asked to.
"""

from __future__ import annotations

import os
from pathlib import Path

from tropd.storage.disk.atomic import atomic_file, explain_disk_errors, fsync_path, make_folder
from tropd.storage.workspace import MARKER

DAMAGED = "damaged"


def aside_folder(stage_folder: Path) -> Path:
    """Folder of the damaged files of a stage (or of one of its parts)."""
    root = next((p for p in stage_folder.parents if (p / MARKER).is_file()), stage_folder.parent)
    return root / DAMAGED / stage_folder.relative_to(root)


def set_aside(stage_folder: Path, name: str) -> Path | None:
    """Move a file or folder of a stage out of the way; returns its new path, None if it did not exist.

    Raises:
        DiskError: it cannot be moved.
    """
    source = stage_folder / name
    if not source.exists():
        return None
    target = _free(aside_folder(stage_folder) / name)
    with explain_disk_errors(target):
        make_folder(target.parent)
        os.rename(source, target)
        fsync_path(target.parent)
    return target


def keep_aside(stage_folder: Path, name: str, content: bytes) -> Path:
    """Write content that cannot stay in its file; returns the new path.

    Raises:
        DiskError: it cannot be written.
    """
    target = _free(aside_folder(stage_folder) / name)
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)
    return target


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
