"""Atomic writes: the new content or the old one, and errors that name the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tropd.storage.disk import atomic
from tropd.storage.disk.atomic import (
    atomic_directory,
    atomic_file,
    content_digest,
    content_size,
    explain_disk_errors,
    make_folder,
    remove_temporaries,
    write_text_atomic,
)
from tropd.storage.errors import DataError, DiskError, DiskFullError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_whole_and_folders_are_made(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a" / "b" / "file", "größe\n")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == "größe\n".encode()
    assert names(tmp_path / "a" / "b") == ["file"]


def test_failed_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="mine"), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise RuntimeError("mine")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_directory_replaces_an_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "d") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / content).write_text(content)
    assert names(tmp_path / "d" / "sub") == ["new"]
    assert names(tmp_path) == ["d"]


def test_directory_that_cannot_be_renamed_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "f").write_text("old")
    original = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "d" and "old" not in Path(source).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(DiskFullError), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "f").write_text("new")
    assert (tmp_path / "d" / "f").read_text() == "old"
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(errno.EIO, "Input/output error"), DiskError),
        (OSError(errno.EROFS, "Read-only file system"), DiskError),
        (PermissionError(errno.EACCES, "Permission denied"), DiskError),
        (FileNotFoundError(errno.ENOENT, "No such file"), FileNotFoundError),
        (ValueError("something else"), ValueError),
        (DataError("already explained"), DataError),
    ],
)
def test_disk_errors_name_the_file(tmp_path: Path, raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught, explain_disk_errors(tmp_path / "weights.bin"):
        raise raised
    assert type(caught.value) is expected
    if isinstance(caught.value, DiskError):
        assert str(tmp_path / "weights.bin") in caught.value.message
        assert caught.value.__cause__ is raised


def test_full_disk_during_write_removes_the_temporary(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), atomic_file(tmp_path / "f") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_remove_temporaries_finds_nested_ones_and_nothing_else(tmp_path: Path) -> None:
    for name in (".tmp-1-a", "checkpoints/.tmp-2-b", "keep", "checkpoints/step/.tmp-not-mine", "done.zarr/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-3-dir" / "sub").mkdir(parents=True)
    remove_temporaries(tmp_path, skip=[tmp_path / "checkpoints/step"])
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["checkpoints/step/.tmp-not-mine", "done.zarr/c", "keep"]
    assert not (tmp_path / ".tmp-3-dir").exists()


def test_make_folder_flushes_every_new_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(atomic, "fsync_path", flushed.append)
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.binary(max_size=20), min_size=1))
def test_digest_depends_on_names_and_content_only(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    first, second = tmp_path_factory.mktemp("x"), tmp_path_factory.mktemp("y")
    for folder, items in ((first, list(files.items())), (second, list(files.items())[::-1])):
        for name, content in items:
            (folder / name).write_bytes(content)
    os.utime(second / next(iter(files)), (0, 4e9))  # a clock that jumps must not matter
    assert content_digest(first) == content_digest(second)
    assert content_size(first) == sum(map(len, files.values()))
    assert content_size(first / "not there") == 0
    changed = second / next(iter(files))
    changed.write_bytes(changed.read_bytes() + b"!")
    assert content_digest(first) != content_digest(second)
    changed.write_bytes(changed.read_bytes()[:-1])
    changed.rename(second / "other name")
    assert content_digest(first) != content_digest(second)
