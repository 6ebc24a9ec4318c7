"""A cache layer that is told its place by a tensor."""

from __future__ import annotations

import torch

from tropd.pipeline.models.engines.graphs.allocated_cache import AllocatedLayer


def test_columns_that_are_not_written_hold_zeros() -> None:
    """They have no weight; but nothing times NaN is NaN."""
    layer = AllocatedLayer(3)
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    layer.reserve(4)
    layer.place = (torch.tensor([3]), 5)
    keys, values = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    for found in (keys, values):
        assert found[0, 0, :, 0].tolist() == [1, 1, 0, 1, 0]
