"""A stage that is killed or whose disk fails at any durable operation ends, after a rerun, as if nothing was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("faults.py")
# One operation in so many: of a kill, and of what takes longer.
STRIDE, LONGER = (1, 4) if os.environ.get("TROPD_THOROUGH") else (16, 48)


def run_faults(root: Path, mode: str, stride: int) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(root), mode, str(stride)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, *points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == len(range(1, header["operations"] + 1, stride)) > 0
    return points


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "stride"), [("kill", STRIDE), *((mode, LONGER) for mode in ("kill-twice", "eio", "enospc"))]
)
def test_rerun_completes_byte_identical(tmp_path: Path, mode: str, stride: int) -> None:
    points = run_faults(tmp_path, mode, stride)
    assert [p for p in points if p["rerun"] != "done" or p["different"] or p["lost"]] == []
    if mode.startswith("kill"):
        # Zarr's concurrent mkdirs make the count vary by one or two: the last points may come after the end.
        assert sum(p["first"] == "killed" for p in points) >= len(points) - 3
    else:
        assert [p for p in points if not str(p["first"]).startswith(("TropdError", "done"))] == []
        assert sum(p["first"] != "done" for p in points) > len(points) // 2
        words = "disk full" if mode == "enospc" else "Input/output error"
        assert all(words in str(p["first"]) for p in points if p["first"] != "done")


LIMITED = """
import resource, sys
sys.path.insert(0, {tests!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from pathlib import Path
import storage_samples as samples
from tropd.storage.errors import DiskFullError
from tropd.storage.cache.shard import write_topk
from tropd.storage.formats.trajectories import write_trajectories
rows = [samples.trajectory(i, num_tokens=3000) for i in range(20)]
try:
    if {kind!r} == "parquet":
        write_trajectories(Path({path!r}), rows)
    else:
        write_topk(Path({path!r}), samples.topk_of(rows))
except DiskFullError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["parquet", "zarr"])
def test_file_size_limit_is_a_full_disk_that_leaves_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"part-00000.{kind}"
    code = LIMITED.format(tests=str(SCRIPT.parent), limit=20_000, kind=kind, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "disk full" in done.stdout
    assert str(path) in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_really_full_disk_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    import storage_samples as samples

    from tropd.storage.errors import DiskFullError
    from tropd.storage.formats.trajectories import read_trajectories, write_trajectories
    from tropd.storage.stage.fingerprint import Fingerprint
    from tropd.storage.stage.manifest import check_shard
    from tropd.storage.stage.stage import open_stage

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mount is not permitted here")
    try:
        rows = [samples.trajectory(i, num_tokens=2000) for i in range(5)]
        fingerprint = Fingerprint({"seed": 1})

        def fill() -> None:
            with open_stage(disk / "stage", "fill", fingerprint) as stage:
                for index in range(100):
                    if not stage.has(name := f"part-{index:05d}.parquet"):
                        stage.commit(name, write_trajectories(stage.folder / name, rows))

        with pytest.raises(DiskFullError, match="disk full while writing"):
            fill()
        with open_stage(disk / "stage", "fill", fingerprint) as stage:
            finished = list(stage.manifest.shards.values())
            assert len(finished) > 1
            for shard in finished:
                check_shard(stage.folder, shard)
                assert next(read_trajectories(stage.folder / shard.name)).tokens == rows[0].tokens
        with pytest.raises(DiskFullError):
            fill()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        fill()
    finally:
        subprocess.run(["umount", disk], check=True)
