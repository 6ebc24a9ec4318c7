"""Running a stage: one writer at a time, resumable, refusing to mix outputs of different settings.

    with open_stage(folder, "prefixes", fingerprint) as stage:
        for name in shard_names:
            if not stage.has(name):
                with atomic_file(folder / name) as temporary:
                    ...
                stage.commit(name, rows=...)
        stage.finish()

A kill at any instant loses at most the shard being written: a shard counts only once the manifest, itself
replaced atomically, names it with its checksum.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tropd.storage.disk.aside import set_aside
from tropd.storage.disk.atomic import explain_disk_errors, make_folder, remove_temporaries
from tropd.storage.errors import (
    DamagedShardError,
    DiskError,
    FingerprintMismatchError,
    InterruptedStageError,
    StageLockedError,
    TropdError,
)
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import (
    FILE_NAME,
    Manifest,
    broken_shards,
    describe_shard,
    holds_output,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger(__name__)
LOCK_NAME = ".lock"


class Stage:
    """The writer's view of a stage folder. Obtained from ``open_stage``, valid inside its block."""

    def __init__(
        self, folder: Path, manifest: Manifest, timings: Path | None, broken: Collection[str] = ()
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.broken = tuple(broken)
        """Shards that the manifest on disk named, missing or of the wrong size; the next change strikes them."""
        self.unrecorded: Sequence[str] = ()
        """Recent fields of the fingerprint that the manifest, made by an older version, does not have."""
        self.shared = False
        """True if others write into the folder, such as workers that may outlive an error here."""
        self._timings = timings
        self._mark = time.monotonic()
        self._place = _place(folder)

    @property
    def complete(self) -> bool:
        return self.manifest.complete

    def has(self, name: str) -> bool:
        return name in self.manifest.shards

    def commit(self, name: str, rows: int) -> None:
        """Record a shard that is already in place under its final name."""
        self._check_place()
        shards = {**self.manifest.shards, name: describe_shard(self.folder, name, rows)}
        self._replace(shards=dict(sorted(shards.items())))
        self._log_time()

    def retire(self, name: str) -> None:
        """Forget a shard; call it before deleting the file, so that the manifest never names a missing one."""
        self._replace(shards={k: v for k, v in self.manifest.shards.items() if k != name})

    def finish(self, **summary: Any) -> None:
        """Mark the stage complete, with a small JSON-serializable summary."""
        self._replace(complete=True, summary=summary)
        self._log_time()

    def _check_place(self) -> None:
        if _place(self.folder) != self._place:
            raise DiskError(
                f"{self.folder} is no longer the folder that this stage was started in: it was moved, deleted or "
                "replaced meanwhile; output since its last commit is not part of it",
                hint="run the same command again, with -w where the workspace is now",
            )

    def _replace(self, **changes: Any) -> None:
        self._check_place()
        manifest = self.manifest.model_copy(update=changes)
        write_manifest(self.folder, manifest)
        self.manifest = manifest  # only now: after a failed write, memory must not claim more than the disk

    def _log_time(self) -> None:
        """Append the time since the last entry: their sum is the stage's time over all its sessions."""
        if self._timings is None:
            return
        now = time.monotonic()
        entry = {"stage": self.manifest.stage, "seconds": round(now - self._mark, 6)}
        with explain_disk_errors(self._timings):
            self._timings.parent.mkdir(parents=True, exist_ok=True)
            with self._timings.open("a+b") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
                torn = stream.read(1) not in (b"", b"\n")  # a killed writer's half line must not eat this one
                stream.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
        self._mark = now


def _place(folder: Path) -> tuple[int, int] | None:
    """Identity of a folder, which another one under its name does not have; None if the folder does not exist."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def lock_stage(folder: Path) -> Iterator[None]:
    """Be the only writer of a stage folder (created if missing) while the block runs.

    Raises:
        StageLockedError: another process is.
    """
    with explain_disk_errors(folder):
        make_folder(folder)
        lock = FileLock(folder.parent / f".{folder.name}{LOCK_NAME}", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StageLockedError(
                f"another process is writing {folder}",
                hint="wait for it, or stop it; the lock is released when the process ends",
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_stage(
    folder: Path, name: str, fingerprint: Fingerprint, *, force: bool = False, timings: Path | None = None
) -> Iterator[Stage]:
    """Lock a stage folder and load or start its manifest.

    Shards that are listed but missing or of the wrong size are left out of the stage's manifest, so that they are
    made again (the remains of one are set aside); the manifest on disk follows with the stage's first change. A stage
    that was started but holds nothing yet takes the new fingerprint; one that holds something keeps its own, also where
    that lacks recent fields. With ``force``, an existing output is moved aside to ``<folder>.old-<n>``; it is moved back
    where the block fails before it has made anything, as on bad input.

    Raises:
        StageLockedError: another process holds the stage.
        DamagedShardError: the manifest is not readable, or missing while there is output.
        FingerprintMismatchError: the existing output was made with other settings or inputs.
        InterruptedStageError: for a KeyboardInterrupt after ``force`` has had an effect: the hint says how to resume.
    """
    with lock_stage(folder):
        aside = _move_aside(folder) if force else None
        stage = None
        try:
            stage = _load(folder, name, fingerprint, timings)
            yield stage
        except BaseException as error:
            if aside is None:
                raise
            if not holds_output(folder) and not (stage and stage.shared):
                _move_back(aside, folder)
                raise
            told = _begun_anew(name, error)
            if told is error:
                raise
            raise told from error


_SAME = "the same command"


def _begun_anew(name: str, error: BaseException) -> BaseException:
    """The error that ended a stage begun anew by ``force``; its hint drops ``--force``, which would start over again."""
    if isinstance(error, KeyboardInterrupt):
        hint = f"run {_SAME} without --force to resume"
        return InterruptedStageError(f"{name}: interrupted", hint=hint)
    if isinstance(error, TropdError) and error.hint is not None:
        error.hint = error.hint.replace(_SAME, f"{_SAME} without --force")
    return error


def _load(folder: Path, name: str, fingerprint: Fingerprint, timings: Path | None) -> Stage:
    manifest = read_manifest(folder)
    remove_temporaries(folder, skip=[folder / shard for shard in manifest.shards] if manifest else ())
    if manifest is None and holds_output(folder):
        found = sorted(path.name for path in folder.iterdir())
        raise DamagedShardError(
            f"{folder / FILE_NAME} is missing, and without it nothing is known of the files beside it "
            f"({', '.join(found[:5])}{', …' if found[5:] else ''}); nothing was changed",
            hint="put it back from a copy, or start the stage over with --force (the old output is moved aside, not "
            "deleted)",
        )
    if manifest is None or (manifest.fingerprint != fingerprint.digest and not holds_output(folder)):
        manifest = Manifest.start(name, fingerprint)
        write_manifest(folder, manifest)
    else:
        refuse_other_settings(name, folder, manifest, fingerprint)
    problems = broken_shards(folder, manifest)
    broken = list(problems)
    if broken:
        logger.warning("%s: %s", name, "; ".join(problems.values()))
    for shard in broken:
        set_aside(folder, shard)
    stage = Stage(folder, _without(manifest, broken) if broken else manifest, timings, broken)
    stage.unrecorded = fingerprint.missing_from(manifest.fields)
    return stage


def _move_aside(folder: Path) -> Path | None:
    """Move a stage's output aside; returns its new path, None if there was no output."""
    if not any(folder.iterdir()):
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, target)
    logger.info("moved the old output of %s to %s", folder.name, target.name)
    folder.mkdir()
    return target


def _move_back(aside: Path, folder: Path) -> None:
    """Move the old output back; a failure here never hides the error that is the reason for it."""
    try:
        remove_temporaries(folder)
        (folder / FILE_NAME).unlink(missing_ok=True)
        folder.rmdir()
        os.rename(aside, folder)
    except OSError as error:
        logger.warning("the old output of %s stays in %s: %s", folder.name, aside.name, error)
        return
    logger.info("moved the old output of %s back: nothing new was made", folder.name)


def _without(manifest: Manifest, names: Collection[str]) -> Manifest:
    kept = {k: v for k, v in manifest.shards.items() if k not in names}
    return manifest.model_copy(update={"shards": kept, "complete": False})


def drop_shards(folder: Path, manifest: Manifest, names: Collection[str]) -> Manifest:
    """Strike shards from the manifest on disk, so that the stage makes them again. Needs the stage's lock."""
    manifest = _without(manifest, names)
    write_manifest(folder, manifest)
    return manifest


def refuse_other_settings(name: str, folder: Path, manifest: Manifest, fingerprint: Fingerprint) -> None:
    """Stop if a stage's output was made with other settings or inputs.

    Raises:
        FingerprintMismatchError: naming every field that differs.
    """
    changes = fingerprint.changes_from(manifest.fields)
    if not changes:
        return
    lines = "\n".join(
        f"    {field}: {old!r} → {new!r}"
        + (f" ({source})" if (source := fingerprint.sources.get(field)) else "")
        for field, old, new in changes
    )
    raise FingerprintMismatchError(
        f"{folder} holds the output of stage {name!r} made with other settings or inputs:\n{lines}",
        hint="set them back, or start the stage over with --force (the old output is moved aside, not deleted)",
    )


def stage_seconds(timings: Path) -> dict[str, float]:
    """Seconds per stage, summed over all sessions, from the timings log (torn last lines are ignored)."""
    seconds: dict[str, float] = {}
    if timings.exists():
        for line in timings.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                stage, spent = str(entry["stage"]), float(entry["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return seconds
