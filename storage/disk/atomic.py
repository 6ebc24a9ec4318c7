"""Durable, atomic writes: a reader sees the whole new content or the old one, never a part.

Every write goes to a temporary name in the same folder, is flushed to disk, renamed, and the folder
entry flushed. Temporary names start with ``.tmp-`` so that a later run can recognize and remove them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tropd.storage.errors import DiskError, DiskFullError, TropdError

TEMPORARY_PREFIX = ".tmp-"
_FSYNC_THREADS = 16

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
# Writers in C++ and Rust (safetensors, torch) pass the system's reason on as text only.
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large")


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, failing or read-only disk into an error that names ``path``; other errors pass.

    Raises:
        DiskFullError: no space, no quota, or beyond the file size limit.
        DiskError: an I/O error, a read-only file system or missing permission.
    """
    try:
        yield
    except TropdError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            raise DiskFullError(
                f"disk full while writing {path} ({error})",
                hint="free some space and run the same command again: finished shards are kept",
            ) from error
        if code in _REFUSED:
            raise DiskError(
                f"cannot write {path}: {error}",
                hint="check the disk and the folder's permissions, then run the same command again",
            ) from error
        raise


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents so that they survive a power cut."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


def _temporary_for(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it becomes ``path`` when the block ends without error.

    Raises:
        DiskError: the disk is full or failing, also when the block's own writes find that out.
    """
    temporary = _temporary_for(path)
    with explain_disk_errors(path):
        make_folder(path.parent)
        try:
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            with suppress(OSError):  # the reason for coming here matters more; the next run removes it
                temporary.unlink()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` when the block ends without error.

    An existing ``path`` is renamed to a temporary name first and put back if the new one cannot take its
    place, so that at every instant ``path`` is absent or whole.

    Raises:
        DiskError: the disk is full or failing, also when the block's own writes find that out.
    """
    temporary = _temporary_for(path)
    retired = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}")
    with explain_disk_errors(path):
        make_folder(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _fsync_tree(temporary)
            _swap_in(temporary, path, retired)
            fsync_path(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    """Flush all files and folders. At once: the file system then commits them together, several times faster."""
    paths = [Path(parent) / name for parent, _, files in os.walk(folder) for name in ["", *files]]
    if len(paths) <= 2:
        for path in paths:
            fsync_path(path)
        return
    with ThreadPoolExecutor(_FSYNC_THREADS) as pool:
        list(pool.map(fsync_path, paths))


def _swap_in(temporary: Path, path: Path, retired: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    shutil.rmtree(retired, ignore_errors=True)
    os.rename(path, retired)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(retired, path)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the content of ``path`` atomically (UTF-8)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(folder: Path, skip: Collection[Path] = ()) -> None:
    """Delete interrupted writers' leftovers in ``folder`` and below. Call only while holding its lock.

    ``skip`` names folders that need no search: finished shards hold no temporary.
    """
    for parent, folders, files in os.walk(folder):
        for name in [n for n in folders if n.startswith(TEMPORARY_PREFIX)]:
            shutil.rmtree(Path(parent) / name, ignore_errors=True)
        for name in [n for n in files if n.startswith(TEMPORARY_PREFIX)]:
            (Path(parent) / name).unlink(missing_ok=True)
        folders[:] = [
            n for n in folders if not n.startswith(TEMPORARY_PREFIX) and Path(parent) / n not in skip
        ]


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, or of a folder as the sorted list of its relative names and file digests."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{content_digest(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder. Missing files, and those that vanish meanwhile, count 0."""
    if not path.is_dir():
        return _file_size(path)
    return sum(_file_size(Path(parent, name)) for parent, _, names in os.walk(path) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
