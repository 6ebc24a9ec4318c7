"""The number of processes, their ranks, and the GPU of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tropd.pipeline.run.processes.gpus import number_of_gpus, run_parts, run_ranks
from tropd.pipeline.run.progress import SILENT
from tropd.storage.errors import ConfigError

SAYS = """
import json, os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
said = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[2:]}
name = os.environ.get("RANK") or sys.argv[-1].replace("/", "-of-")
(pathlib.Path(sys.argv[1]) / f"{name}.json").write_text(json.dumps(said))
"""


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("visible", "wanted", "device", "number"),
    [(8, None, "auto", 8), (8, 3, "cuda", 3), (8, None, "cpu", 1), (0, None, "auto", 1), (0, 2, "auto", 2)],
)
def test_the_number_is_the_wanted_one_or_that_of_the_visible_gpus(
    on_gpus: Any, visible: int, wanted: int | None, device: Any, number: int
) -> None:
    on_gpus(visible)
    assert number_of_gpus(wanted, device, SILENT) == number


def test_more_than_are_visible_are_refused_with_both_numbers(on_gpus: Any) -> None:
    on_gpus(2)
    with pytest.raises(ConfigError, match=r"--gpus 8: only 2 GPUs are visible(.|\n)*--gpus 2"):
        number_of_gpus(8, "auto", SILENT)


def test_a_rank_starts_no_processes(on_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert number_of_gpus(None, "auto", SILENT) == 1
    with pytest.raises(ConfigError, match="started by torchrun"):
        number_of_gpus(2, "auto", SILENT)


def test_ranks_are_numbered_and_see_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    command = [sys.executable, "-c", SAYS, str(tmp_path)]
    assert run_ranks(command, 2, tmp_path / "logs", "train", shown=True) == 0
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (said["RANK"], said["LOCAL_RANK"], said["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert said["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["train-rank-1.log"]


def test_parts_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,6,7")
    command = [sys.executable, "-c", SAYS, str(tmp_path), "scores"]
    run_parts(command, 2, tmp_path, "scores", devices_each=2)
    said = [json.loads((tmp_path / f"{part}-of-2.json").read_text()) for part in (1, 2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in said] == ["3,4", "6,7"]
    assert [one["arguments"] for one in said] == [["scores", "--shards", f"{part}/2"] for part in (1, 2)]
    assert said[0]["RANK"] is None
