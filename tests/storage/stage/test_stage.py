"""The stage: one writer, resumable, never mixing outputs of different settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_samples import tree

from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import (
    DamagedShardError,
    DiskError,
    DiskFullError,
    FingerprintMismatchError,
    InterruptedStageError,
    StageLockedError,
)
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.stage.stage import Stage, open_stage, stage_seconds

ONE = Fingerprint({"seed": 1, "model": "a"})


def fill(folder: Path, fingerprint: Fingerprint = ONE, *, parts: int = 3, force: bool = False) -> list[str]:
    """Run a stage of small text shards; returns the names that were written now."""
    written = []
    with open_stage(folder, "texts", fingerprint, force=force) as stage:
        for index in range(parts):
            if not stage.has(name := f"part-{index}"):
                write_text_atomic(stage.folder / name, f"content {index}")
                stage.commit(name, rows=index)
                written.append(name)
        if not stage.complete:
            stage.finish(rows=stage.manifest.rows)
    return written


def test_rerun_of_a_finished_stage_does_nothing(tmp_path: Path) -> None:
    assert len(fill(tmp_path / "s")) == 3
    before = tree(tmp_path)
    for path in (tmp_path / "s").iterdir():
        os.utime(path, (0, 4e9))  # the clock jumped
    assert fill(tmp_path / "s") == []
    assert tree(tmp_path) == before
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None
    assert (manifest.rows, manifest.complete, manifest.summary) == (3, True, {"rows": 3})
    assert manifest.size == 27


def test_missing_and_truncated_shards_are_made_again(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    before = tree(tmp_path / "s")
    (tmp_path / "s" / "part-0").unlink()
    (tmp_path / "s" / "part-2").write_text("half")
    assert fill(tmp_path / "s") == ["part-0", "part-2"]
    assert tree(tmp_path / "s") == before
    assert (tmp_path / "damaged" / "s" / "part-2").read_text() == "half"


@pytest.mark.parametrize("force", [False, True])
def test_output_without_its_manifest_is_neither_continued_nor_begun_anew(tmp_path: Path, force: bool) -> None:
    fill(tmp_path / "s", parts=2)
    (tmp_path / "s" / "manifest.json").unlink()
    before = tree(tmp_path / "s")
    if force:
        fill(tmp_path / "s", parts=1, force=True)
        assert tree(tmp_path / "s.old-1") == before
        return
    with pytest.raises(DamagedShardError, match=r"s/manifest\.json is missing") as caught:
        fill(tmp_path / "s", parts=1)
    assert "--force" in str(caught.value.hint)
    assert tree(tmp_path / "s") == before


def test_shard_without_manifest_entry_is_made_again(tmp_path: Path) -> None:
    fill(tmp_path / "s", parts=1)
    (tmp_path / "s" / "part-1").write_text("written, but never committed")
    with open_stage(tmp_path / "s", "texts", ONE) as stage:
        assert not stage.has("part-1")


def test_changed_settings_are_named_and_refused(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    before = tree(tmp_path)
    with pytest.raises(FingerprintMismatchError) as caught:
        fill(tmp_path / "s", Fingerprint({"seed": 2, "model": "a", "k": 64}))
    assert "k: None → 64" in str(caught.value)
    assert "seed: 1 → 2" in str(caught.value)
    assert "model" not in caught.value.message.replace("models", "")
    assert "--force" in str(caught.value)
    assert tree(tmp_path) == before


def test_stage_that_holds_nothing_takes_new_settings(tmp_path: Path) -> None:
    fill(tmp_path / "s", parts=0)
    with open_stage(tmp_path / "s", "texts", Fingerprint({"seed": 2})) as stage:
        assert not stage.complete
        assert stage.manifest.fields == {"seed": 2}


def test_force_moves_the_old_output_aside(tmp_path: Path) -> None:
    fill(tmp_path / "s", parts=1)
    for number in (1, 2):
        assert len(fill(tmp_path / "s", Fingerprint({"seed": number + 1}), force=True)) == 3
        assert (tmp_path / f"s.old-{number}" / "part-0").read_text() == "content 0"


def fail(
    folder: Path, error: BaseException, *, make: bool = False, commit: bool = False, shared: bool = False
) -> None:
    with open_stage(folder, "texts", Fingerprint({"seed": 2}), force=True) as stage:
        assert not stage.complete
        stage.shared = shared
        if make:
            write_text_atomic(folder / "new", "x")
        if commit:
            stage.commit("new", rows=1)
        raise error


def test_force_that_makes_nothing_leaves_the_old_output_where_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    before = tree(tmp_path)
    for error in (DiskFullError("bad input"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(tmp_path / "s", error)
        assert tree(tmp_path) == before


def test_force_that_cannot_even_begin_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "s")
    before = tree(tmp_path)

    def full(folder: Path, manifest: object) -> None:
        raise DiskFullError("disk full")

    monkeypatch.setattr("tropd.storage.stage.stage.write_manifest", full)
    with pytest.raises(DiskFullError):
        fail(tmp_path / "s", KeyboardInterrupt())
    assert tree(tmp_path) == before


def test_what_others_may_still_write_does_not_meet_the_old_output(tmp_path: Path) -> None:
    fill(tmp_path / "s", parts=1)
    with pytest.raises(DiskFullError):
        fail(tmp_path / "s", DiskFullError("a worker failed"), shared=True)
    (tmp_path / "s" / "part-0").write_text("of another worker, late")
    assert (tmp_path / "s.old-1" / "part-0").read_text() == "content 0"


@pytest.mark.parametrize("committed", [True, False])
def test_force_that_made_something_keeps_both(tmp_path: Path, committed: bool) -> None:
    """Also where that is no shard: a saved batch, or metrics."""
    fill(tmp_path / "s", parts=1)
    with pytest.raises(DiskFullError):
        fail(tmp_path / "s", DiskFullError("disk full"), make=True, commit=committed)
    assert (tmp_path / "s" / "new").read_text() == "x"
    assert (tmp_path / "s.old-1" / "part-0").read_text() == "content 0"


def test_after_force_the_way_to_go_on_is_without_it(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    with pytest.raises(InterruptedStageError) as interrupted:
        fail(tmp_path / "s", KeyboardInterrupt(), make=True)
    assert interrupted.value.hint == "run the same command without --force to resume"
    with pytest.raises(DiskFullError) as full:
        fail(tmp_path / "s", DiskFullError("full", hint="then run the same command again"), make=True)
    assert full.value.hint == "then run the same command without --force again"


def test_failed_write_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_stage(tmp_path / "s", "texts", ONE) as stage:
        write_text_atomic(stage.folder / "part-0", "x")

        def full(folder: Path, manifest: object) -> None:
            raise DiskFullError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr("tropd.storage.stage.stage.write_manifest", full)
            with pytest.raises(DiskFullError):
                stage.commit("part-0", rows=1)
        assert not stage.has("part-0")
        stage.commit("part-0", rows=1)
        assert stage.has("part-0")
        stage.retire("part-0")
        assert not stage.has("part-0")


HOLDER = """
import sys, time
from pathlib import Path
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage
with open_stage(Path(sys.argv[1]), "texts", Fingerprint({"seed": 1, "model": "a"})) as stage:
    (stage.folder / ".tmp-1-part-0").write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_second_writer_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(StageLockedError, match="another process is writing"):
            fill(tmp_path / "s")
        assert (tmp_path / "s" / ".tmp-1-part-0").exists()  # not ours to clean while it is being written
        manifest = read_manifest(tmp_path / "s")  # readers need no lock
        assert manifest is not None
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert len(fill(tmp_path / "s")) == 3
    assert not (tmp_path / "s" / ".tmp-1-part-0").exists()


def test_same_process_cannot_open_twice(tmp_path: Path) -> None:
    with open_stage(tmp_path / "s", "texts", ONE), pytest.raises(StageLockedError):
        fill(tmp_path / "s")
    assert len(fill(tmp_path / "s")) == 3


def test_timings_add_up_despite_torn_lines_and_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = tmp_path / "logs" / "timings.jsonl"
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with open_stage(tmp_path / "s", "texts", ONE, timings=timings) as stage:
        stage.finish()
    with timings.open("ab") as stream:
        stream.write(b'{"stage": "tex\xff')
    with open_stage(tmp_path / "s", "texts", ONE, timings=timings) as stage:
        stage.finish()
    with timings.open("a") as stream:
        stream.write('3\n{"stage": "other", "seconds": 2.5}\n{"seconds": 1}\n')
    seconds = stage_seconds(timings)
    assert seconds.keys() == {"texts", "other"}
    assert 0 <= seconds["texts"] < 5
    assert seconds["other"] == 2.5
    assert len(timings.read_bytes().splitlines()) == 6
    assert stage_seconds(tmp_path / "absent") == {}


def test_readers_see_whole_manifests_while_one_writes(tmp_path: Path) -> None:
    with open_stage(tmp_path / "s", "texts", ONE) as stage:
        assert isinstance(stage, Stage)
        seen = []
        for index in range(20):
            write_text_atomic(stage.folder / f"part-{index:02d}", "x")
            stage.commit(f"part-{index:02d}", rows=1)
            manifest = read_manifest(tmp_path / "s")
            assert manifest is not None
            seen.append(manifest.rows)
    assert seen == list(range(1, 21))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_workspace_that_is_moved_meanwhile_takes_no_results(tmp_path: Path, replaced: bool) -> None:
    folder, moved = tmp_path / "run" / "prefixes", tmp_path / "moved" / "prefixes"
    with open_stage(folder, "prefixes", ONE) as stage:
        write_text_atomic(folder / "one", "1")
        stage.commit("one", 1)
        folder.parent.rename(moved.parent)
        if replaced:  # as writing a file does, which makes missing folders
            write_text_atomic(folder / "two", "2")
        for change in (lambda: stage.commit("two", 1), stage.finish):
            with pytest.raises(DiskError, match=r"run/prefixes is no longer the folder.*moved") as caught:
                change()
    assert "-w where the workspace is now" in str(caught.value)
    with open_stage(moved, "prefixes", ONE) as stage:
        assert stage.has("one")
        assert not stage.has("two")
        assert not stage.complete
