"""Weights in memory that two views share: cast, aligned, and room for all of them before any is written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tropd.pipeline.models.engines.child import weights
from tropd.pipeline.models.engines.child.weights import can_hand_over, layout_of, open_memory, views
from tropd.storage.errors import MemoryFullError

STATE = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "empty": torch.zeros(0, 4),
    "counts": torch.tensor([1, 2, 3]),
    "scalar": torch.tensor(2.5),
    "b": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_side_writes_the_other_reads_in_the_engines_precision(dtype: torch.dtype) -> None:
    layout = layout_of(STATE, dtype)
    memory = open_memory(layout.num_bytes)
    ours, theirs = views(memory, layout), views(os.dup(memory), layout)
    for name, value in STATE.items():
        ours[name].copy_(value)
    for name, value in STATE.items():
        expected = value.to(dtype) if value.is_floating_point() else value
        assert theirs[name].dtype == expected.dtype
        assert torch.equal(theirs[name], expected), name
    ours["a"].fill_(4.0)
    assert float(theirs["a"].mean()) == 4.0
    assert all(place.start % 64 == 0 for place in layout.places)


def test_memory_is_where_there_is_room_and_leaves_no_file(tmp_path: Path) -> None:
    os.close(open_memory(1000, [tmp_path / "missing", tmp_path]))
    assert not list(tmp_path.iterdir())


def test_weights_that_fit_nowhere_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(MemoryFullError, match=r"need 1152921504\.61 GB .* free are [0-9.]+ in ") as refused:
        open_memory(2**60, [tmp_path])
    assert "--shm-size" in str(refused.value.hint)


def test_memory_of_a_gpu_is_handed_over_unless_its_segments_are_expandable() -> None:
    assert can_hand_over({})
    assert can_hand_over({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:False"})
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert not can_hand_over({name: "max_split_size_mb:128, expandable_segments: True"})


def test_handles_are_named_by_the_gpu_that_the_weights_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def properties(device: torch.device) -> Any:
        asked.append(device)
        return SimpleNamespace(uuid=f"GPU-of-{device}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(weights, "reduce_tensor", lambda value: (None, (value.dtype, value.is_contiguous())))
    state = {"a": torch.ones(2, 3).T, "counts": torch.tensor([1, 2])}
    update, kept = weights.handles(state, torch.bfloat16)
    assert update == {
        "names": ["a", "counts"],
        "dtype_names": ["bfloat16", "int64"],
        "shapes": [[3, 2], [2]],
        "ipc_handles": [{"GPU-of-cpu": (torch.bfloat16, True)}, {"GPU-of-cpu": (torch.int64, True)}],
    }
    assert [value.dtype for value in kept] == [torch.bfloat16, torch.int64]
    assert set(asked) == {torch.device("cpu")}
