"""Tensors that several processes write are read back whole, by any number of processes, or not at all."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tropd.pipeline.training.record import sharded_tensors
from tropd.pipeline.training.record.sharded_tensors import copied, load_tensors, save_tensors, stored_tensors
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import DamagedShardError

CASES = Path(__file__).with_name("sharded_cases.py")
whole_tensors = runpy.run_path(str(CASES))["tensors"]


def run(action: str, size: int, folder: Path) -> list[str]:
    """The output of each process."""
    command = [sys.executable, str(CASES), action]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output.strip())
    return outputs


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in whole_tensors().items()}


@pytest.mark.slowest
def test_two_processes_save_what_one_and_three_load(tmp_path: Path) -> None:
    for output in run("save", 2, tmp_path):
        apart, full = output.splitlines()
        # Each process had a folder of its own, as on machines that share no file system.
        assert re.match(r"apart: .*machine-1 was written by another process, and is not here", apart)
        assert "file system that all machines of a run share" in apart
        # The second had no room; the first learns it.
        assert re.match(r"full: .*No space left on device", full)
    assert not (tmp_path / "machine-1").exists()
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == ["shard-00001-00001.safetensors", "shard-00002-00001.safetensors"]
    with safe_open(tmp_path / "saved" / files[1], framework="pt") as second:
        assert second.get_tensor("even").shape == (6, 5)
        assert second.get_tensor("uneven").shape == (3, 3)
    found = zeros()
    load_tensors(tmp_path / "saved", found)
    for name, value in whole_tensors().items():
        assert torch.equal(found[name], value), name
        assert stored_tensors(tmp_path / "saved")[name] == (value.shape, value.dtype)
    run("load", 3, tmp_path)
    for lost in files:
        content = (tmp_path / "saved" / lost).read_bytes()
        (tmp_path / "saved" / lost).unlink()
        with pytest.raises(DamagedShardError, match=f"saved lacks {lost}"):
            stored_tensors(tmp_path / "saved")
        (tmp_path / "saved" / lost).write_bytes(content)
    stored_tensors(tmp_path / "saved")


def test_equal_tensors_give_equal_bytes_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = whole_tensors() | {f"more.{n}": torch.full((8, 8), float(n)) for n in range(20)}
    monkeypatch.setattr(sharded_tensors, "FILE_BYTES", 1000)
    for number in range(3):
        shifted = [*tensors][number * 9 :] + [*tensors][: number * 9]
        save_tensors(tmp_path / str(number), {name: tensors[name] for name in shifted})
    assert len({content_digest(tmp_path / str(number)) for number in range(3)}) == 1
    files = sorted((tmp_path / "0").iterdir())
    assert len(files) > 4
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    load_tensors(tmp_path / "0", found)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"[Ss]ize mismatch.*\ba\b|\ba\b.*size"):
        load_tensors(tmp_path, {"a": torch.zeros(4, 4)})
    with pytest.raises(RuntimeError, match="b"):
        load_tensors(tmp_path, {"b": torch.zeros(3, 4)})


def test_copies_are_of_their_own() -> None:
    tensor = torch.ones(4, requires_grad=True)
    copies = copied({"a": tensor, "step": torch.tensor(1.0)})
    with torch.no_grad():
        tensor.zero_()
    assert copies["a"].tolist() == [1.0] * 4
    assert not copies["a"].requires_grad
    assert copies["step"].shape == ()
