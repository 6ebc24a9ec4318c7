"""FSDP2 over a single pretended GPU, with gloo: weights are sharded, gathered and reduced as on real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

FREEING = "torch.distributed.fsdp._fully_shard._fsdp_param"
"""FSDP frees the memory of gathered weights in place, and pretended tensors have none of their own."""


@contextlib.contextmanager
def mesh_of_one() -> Iterator[DeviceMesh]:
    """A mesh of this process alone, while ``pretend`` is in force."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with (
            mock.patch(f"{FREEING}.free_storage"),
            mock.patch(f"{FREEING}.alloc_storage"),
            mock.patch.object(torch.Tensor, "record_stream"),
        ):
            yield init_device_mesh("cuda", (1,))
    finally:
        dist.destroy_process_group()
