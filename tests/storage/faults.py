"""Fault injection: run a small stage and let the n-th durable operation kill the process or fail.

As a script (``python faults.py ROOT MODE STRIDE``) it counts the durable operations of an undisturbed run, then for
every STRIDE-th n runs the stage in a fresh folder with a fault at operation n, runs it again without one, and prints one
JSON object per n. Each run is a forked child, so that a kill is a real SIGKILL and hundreds take seconds.

Modes: ``kill`` (SIGKILL before the operation; opening for write leaves half a page of garbage first),
``kill-twice`` (the rerun is killed too, at half the way), ``eio`` and ``enospc`` (the operation raises).
Operations: fsync, rename, replace, mkdir, unlink, rmdir, and opening a file for writing, from any Python code.
Writers in C++ (Parquet) are not interrupted inside; their torn files are made by the garbage before fsync.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import storage_samples as samples
import zarr.storage  # noqa: F401  imported once here, not in each fork

from tropd.storage.cache.shard import write_topk
from tropd.storage.disk.atomic import atomic_directory, write_text_atomic
from tropd.storage.errors import TropdError
from tropd.storage.formats.trajectories import write_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage

FINGERPRINT = Fingerprint({"seed": 1, "model": "abc"})


def run_stage(folder: Path) -> None:
    """Two Parquet shards, a Zarr shard, and three checkpoints of which the last two are kept."""
    with open_stage(folder / "stage", "sample", FINGERPRINT) as stage:
        for index in range(2):
            rows = [samples.trajectory(10 * index + i) for i in range(3)]
            if not stage.has(name := f"part-{index:05d}.parquet"):
                stage.commit(name, rows=write_trajectories(stage.folder / name, rows))
            if index == 0 and not stage.has(name := f"part-{index:05d}.zarr"):
                write_topk(stage.folder / name, samples.topk_of(rows))
                stage.commit(name, rows=len(rows))
        if not stage.complete:
            for step in range(3):
                if not stage.has(name := f"checkpoints/step-{step}") and not stage.has("checkpoints/step-2"):
                    with atomic_directory(stage.folder / name) as temporary:
                        (temporary / "weights").write_bytes(bytes([step]) * 100)
                    stage.commit(name, rows=0)
            if stage.has("checkpoints/step-0"):
                stage.retire("checkpoints/step-0")
            write_text_atomic(stage.folder / "final.json", "{}\n")
            stage.commit("final.json", rows=0)
            stage.finish(rows=6)


class Faults:
    """Counts durable operations and makes number ``at`` (from 1) fail; 0 never fails."""

    def __init__(self, at: int, mode: str) -> None:
        self.at, self.mode, self.count = at, mode, 0

    def install(self) -> None:
        # A killed process loses nothing that it has written: only a power cut would, so the disk is spared.
        os.fsync = self._wrap(lambda fd: None)  # type: ignore[assignment]
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._wrap(getattr(os, name)))
        opening = self._wrap_open(io.open)
        builtins.open = opening  # type: ignore[assignment]
        io.open = opening  # type: ignore[assignment]

    def _due(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _fail(self) -> None:
        if self.mode.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.EIO if self.mode == "eio" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._due():
                self._fail()
            return original(*args, **kwargs)

        return wrapped

    def _wrap_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(letter in mode for letter in "wax+") and not isinstance(file, int) and self._due():
                if self.mode.startswith("kill"):
                    with original(file, "wb") as stream:
                        stream.write(b"\x00garbage" * 50)
                self._fail()
            return original(file, mode, *args, **kwargs)

        return wrapped


def in_child(folder: Path, at: int, mode: str, work: Callable[[Path], None] = run_stage) -> tuple[str, int]:
    """Do the work on the folder in a fork; returns (``done`` | ``killed`` | the error's text, operations counted)."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        faults = Faults(at, mode)
        faults.install()
        try:
            work(folder)
            outcome = "done"
        except TropdError as error:
            outcome = f"TropdError: {error}"
        except BaseException as error:  # the parent must hear of any kind
            outcome = f"{type(error).__name__}: {error}"
        os.write(send, json.dumps([outcome, faults.count]).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "killed", 0
    outcome, count = json.loads(answer)
    return outcome, count


def main(root: Path, mode: str, stride: int) -> None:
    outcome, total = in_child(root / "undisturbed", 0, mode)
    assert outcome == "done", outcome
    expected = samples.tree(root / "undisturbed")
    print(json.dumps({"operations": total}))
    for at in range(1, total + 1, stride):
        folder = root / f"at-{at}"
        folder.mkdir()
        first, _ = in_child(folder, at, mode)
        if mode == "kill-twice":
            in_child(folder, max(1, (total - at) // 2), mode)
        kept = _committed(folder)
        rerun, _ = in_child(folder, 0, mode)
        found = samples.tree(folder)
        print(
            json.dumps(
                {
                    "at": at,
                    "first": first,
                    "rerun": rerun,
                    "different": sorted(
                        k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)
                    ),
                    "lost": sorted(kept - _committed(folder) - {"checkpoints/step-0"}),
                }
            )
        )


def _committed(folder: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(json.loads((folder / "stage" / "manifest.json").read_text())["shards"])
    return set()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
