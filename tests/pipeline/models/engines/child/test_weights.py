"""Weights in memory that two views share: cast, aligned, and room for all of them before any is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tropd.pipeline.models.engines.child.weights import layout_of, open_memory, views
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
