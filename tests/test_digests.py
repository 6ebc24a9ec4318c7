"""The script that compares what two runs have made sees a bit, and does not see a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("digests.py")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Files like those of a run, as far as the script looks at them."""
    folder = tmp_path / "run"
    for name in (
        "prefixes/part-00000.parquet",
        "scores/part-00000.zarr/codes/c/0",
        "train/final/model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    (folder / "logs").mkdir()
    write_metrics(folder, loss=0.5, time_total=1.0)
    return folder


def write_metrics(folder: Path, **values: float) -> None:
    lines = [json.dumps({"step": step, **values}) for step in range(2)]
    (folder / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def digests(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True, check=False)


def test_times_logs_and_locks_do_not_count(workspace: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.txt"
    before.write_text(digests(workspace).stdout)
    assert len(before.read_text().splitlines()) == 5
    write_metrics(workspace, loss=0.5, time_total=2.0)
    (workspace / "logs" / "stages.jsonl").write_text("{}")
    (workspace / "train" / ".lock").touch()
    again = digests(workspace, "--against", before)
    assert (again.returncode, again.stdout) == (0, "the same: 5 digests\n")


@pytest.mark.parametrize(
    "changed", ["loss", "train/final/model.safetensors", "scores/part-00000.zarr/codes/c/0"]
)
def test_what_has_changed_is_named(workspace: Path, tmp_path: Path, changed: str) -> None:
    before = tmp_path / "before.txt"
    before.write_text(digests(workspace).stdout)
    if changed == "loss":
        write_metrics(workspace, loss=0.5000000001, time_total=1.0)
    else:
        (workspace / changed).write_bytes(b"another")
    again = digests(workspace, "--against", before)
    assert again.returncode == 1
    assert ("metrics.jsonl step 1" if changed == "loss" else changed) in again.stdout


def test_a_folder_without_a_run_has_no_digests(tmp_path: Path) -> None:
    assert "no stage" in digests(tmp_path).stderr
