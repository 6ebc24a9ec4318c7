"""A student's weights on their way to the engine beside it: in memory that two processes share, or as handles of a GPU's.

The shared memory is a file without a name, in memory where the system has such a place: it ends with the processes that
have it open, however they end. Floating-point weights are cast to the engine's precision before they go over.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from tropd.storage.errors import MemoryFullError

SHARED = Path("/dev/shm")
_ALIGNED = 64
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables for PyTorch's allocator: the new name and the old one."""


@dataclass(frozen=True)
class Place:
    """A tensor in shared memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class WeightLayout:
    """All tensors of a model's state in shared memory, one after another."""

    places: tuple[Place, ...]
    num_bytes: int


def layout_of(state: Mapping[str, Tensor], dtype: torch.dtype) -> WeightLayout:
    """Places for a state whose floating-point tensors are cast to ``dtype``."""
    types = [_cast(value.dtype, dtype) for value in state.values()]
    sizes = [
        -(-value.numel() * kind.itemsize // _ALIGNED) * _ALIGNED
        for value, kind in zip(state.values(), types, strict=True)
    ]
    *starts, total = accumulate(sizes, initial=0)
    places = (
        Place(name, kind, tuple(value.shape), start)
        for (name, value), kind, start in zip(state.items(), types, starts, strict=True)
    )
    return WeightLayout(tuple(places), max(1, total))


def open_memory(num_bytes: int, folders: Iterable[Path] | None = None) -> int:
    """File descriptor of new shared memory, all of which exists.

    Args:
        folders: where it may lie, best first; if not given /dev/shm, then the folder for temporary files.

    Raises:
        MemoryFullError: none of these has room; the message says how much each has.
    """
    given = (SHARED, Path(tempfile.gettempdir())) if folders is None else folders
    tried = [folder for folder in given if folder.is_dir()]
    for folder in tried:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(
                    file.fileno(), 0, num_bytes
                )  # a file that is too large would kill its writer
                return os.dup(file.fileno())
        except OSError:
            continue
    free = ", ".join(f"{shutil.disk_usage(folder).free / 1e9:.2f} in {folder}" for folder in tried)
    raise MemoryFullError(
        f"the weights of the student's engine need {num_bytes / 1e9:.2f} GB that two processes share; free are {free}",
        hint="give /dev/shm more room (docker run --shm-size=…), or set TMPDIR to a folder that has it",
    )


def views(descriptor: int, layout: WeightLayout) -> dict[str, Tensor]:
    """The tensors in shared memory by name; what is written into them is seen on both sides."""
    memory = mmap.mmap(descriptor, layout.num_bytes)
    return {
        place.name: torch.frombuffer(memory, dtype=place.dtype, count=place.count, offset=place.start).view(
            place.shape
        )
        if place.count
        else torch.empty(place.shape, dtype=place.dtype)
        for place in layout.places
    }


def can_hand_over(environment: Mapping[str, str]) -> bool:
    """Whether another process may open this one's GPU memory by a handle.

    Expandable segments it opens by file descriptors of this process (``pidfd_getfd``), which the system forbids in most
    containers: github.com/pytorch/pytorch/issues/165685.
    """
    settings = ",".join(environment.get(name, "") for name in ALLOCATOR_SETTINGS)
    return "expandable_segments:true" not in settings.lower().replace(" ", "")


def handles(state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
    """A state on a GPU as vLLM's ``IPCWeightTransferUpdateInfo``, and the tensors that must live until it is taken."""
    device = next(iter(state.values())).device
    name = str(torch.cuda.get_device_properties(device).uuid)
    kept = [value.detach().to(_cast(value.dtype, dtype)).contiguous() for value in state.values()]
    update = {
        "names": list(state),
        "dtype_names": [str(value.dtype).removeprefix("torch.") for value in kept],
        "shapes": [list(value.shape) for value in kept],
        "ipc_handles": [{name: reduce_tensor(value)[1]} for value in kept],
    }
    torch.cuda.synchronize(device)  # all copies are made
    return update, kept


def _cast(own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if own.is_floating_point else own
