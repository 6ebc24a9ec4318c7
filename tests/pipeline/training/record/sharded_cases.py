"""One of several processes that save and load sharded tensors; started by test_sharded.py, not a test itself.

Arguments: what to do, the rank, the number of processes, and a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tropd.pipeline.training.record import sharded_tensors as sharded_module
from tropd.pipeline.training.record.sharded_tensors import copied, load_tensors, save_tensors
from tropd.storage.errors import DiskError


def tensors() -> dict[str, torch.Tensor]:
    """Whole ones: some do not divide evenly, one has fewer rows than there are processes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "even": torch.randn(12, 5, generator=generator),
        "uneven": torch.randn(7, 3, generator=generator).to(torch.bfloat16),
        "short": torch.randn(1, 4, generator=generator),
        "vector": torch.randn(5, generator=generator, dtype=torch.float64),
        "replicated": torch.randn(3, 3, generator=generator),
        "step": torch.tensor(17.0),
        "mask": torch.tensor([True, False, True]),
    }


def fail(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def save(rank: int, folder: Path, sharded: dict[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    copies = copied(sharded)
    for value in sharded.values():
        value.zero_()  # training goes on
    save_tensors(folder / "saved", copies, group)
    try:
        save_tensors(folder / f"machine-{rank}", copies, group)
    except DiskError as error:
        print("apart:", str(error).replace("\n", ""))
    if rank == 1:
        sharded_module.save_file = fail
    try:
        save_tensors(folder / "full", copies, group)
    except SafetensorError as error:
        print("full:", error)


def main(action: str, rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{action}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    sharded: dict[str, torch.Tensor] = {}
    for name, value in tensors().items():
        value = value if action != "load" else torch.zeros_like(value)
        if name in ("even", "uneven", "short", "vector"):
            value = distribute_tensor(value, mesh, [Shard(0)])
        elif name == "replicated":
            value = distribute_tensor(value, mesh, [Replicate()])
        sharded[name] = value
    if action == "save":
        save(rank, folder, sharded, dist.new_group(backend="gloo"))
    else:
        load_tensors(folder / "saved", sharded)
        for name, value in tensors().items():
            own = sharded[name]
            assert torch.equal(own.full_tensor() if isinstance(own, DTensor) else own, value), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
