"""Facts of a machine: its GPUs, memory, shared memory and disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tropd.pipeline.models.engines.child.weights import can_hand_over

SHARED_MEMORY = Path("/dev/shm")
QUERY_SECONDS = 20.0
MIB = float(1 << 20)


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use; bytes."""

    name: str
    total: float
    free: float
    """Of it, what no process has taken."""


@dataclass(frozen=True)
class Machine:
    """The machine that a run would use; bytes."""

    gpus: tuple[Gpu, ...]
    memory: float
    """Main memory, of which other programs may have a part."""
    shared_memory: float | None
    """Free in /dev/shm; None where no such place exists."""
    disk: float
    """Free where the workspace lies."""
    hands_over: bool = True
    """Whether a process can open the memory of another one's GPU (see ``can_hand_over``)."""


def look_at_machine(folder: Path, *, gpus: bool = True) -> Machine:
    """The facts of this machine.

    Args:
        folder: of the workspace, or where it will be.
        gpus: False on a machine whose GPUs are not used.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Machine(
        gpus=_gpus() if gpus and torch.cuda.is_available() else (),
        memory=float(psutil.virtual_memory().total),
        shared_memory=float(shutil.disk_usage(SHARED_MEMORY).free) if SHARED_MEMORY.is_dir() else None,
        disk=float(shutil.disk_usage(there).free),
        hands_over=can_hand_over(os.environ),
    )


def _gpus() -> tuple[Gpu, ...]:
    """The visible ones. PyTorch would take half a GB of each to ask, so nvidia-smi is asked first."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=name,memory.total,memory.free"]
    try:
        asked = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=True,
        )
        found = parse_query(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        found = ()
    if len(found) == count:
        return found
    sizes = [torch.cuda.mem_get_info(number) for number in range(count)]
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return tuple(
        Gpu(name, float(total), float(free)) for name, (free, total) in zip(names, sizes, strict=True)
    )


def parse_query(text: str) -> tuple[Gpu, ...]:
    """The answer of ``nvidia-smi --query-gpu=name,memory.total,memory.free``, in MiB.

    Raises:
        ValueError: it is another one.
    """
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, total, free = (part.strip() for part in line.rsplit(",", 2))
        found.append(Gpu(name, MIB * float(total), MIB * float(free)))
    return tuple(found)
