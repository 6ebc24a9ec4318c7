"""The processes that train together: one, or as many as torchrun has started.

Every process plans the whole step and does its share of it: rollouts, questions to the teacher, micro-batches. Rows and
answers are exchanged, so that the loss has the same denominator everywhere, however many there are. Process
0 leads: it alone writes files and talks to the user.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tropd.pipeline.run.processes.child_environment import local_rank
from tropd.pipeline.run.processes.launcher import end_with_launcher
from tropd.storage.errors import TropdError

T = TypeVar("T")
R = TypeVar("R")
N = TypeVar("N", int, float)

# A step of rollouts and a checkpoint of an 8B model both fit; a dead process is noticed by torchrun at once.
TIMEOUT = timedelta(hours=2)
_LOST = re.compile(r"gloo/transport|NCCL|[Cc]onnection (was )?(closed|reset|refused)")


@dataclass(frozen=True)
class World:
    """The processes that take part. With size 1 every method is the identity."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    """Process group of the messages; the default group if not set."""
    waits: list[float] = field(default_factory=list, compare=False)
    """Seconds of the exchanges since ``take_waits``: of waiting for the others, mostly."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def aside(self) -> World:
        """The same processes for another thread, whose messages must not meet those of this one."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT), waits=[])

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. Values are pickled, between processes of this run only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        started = time.perf_counter()
        dist.all_gather_object(values, value, group=self.group)
        self.waits.append(time.perf_counter() - started)
        return values

    def take_waits(self) -> float:
        """Seconds that this process has waited in exchanges since the last call."""
        seconds = sum(self.waits)
        self.waits.clear()
        return seconds

    def tell(self, value: T) -> T:
        """Process 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process."""
        return list(items[self.rank :: self.size])

    def spread(self, items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
        """``work`` over all items, each item done by one process; every process gets all results, in order."""
        if self.size == 1:
            return work(list(items))
        results: list[Any] = [None] * len(items)
        for rank, share in enumerate(self.gather(work(self.share(items)))):
            results[rank :: self.size] = share
        return results

    def merge(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """All processes' arrays in one: at most one process has a number at a place, the others NaN."""
        if self.size == 1:
            return array
        merged = np.full_like(array, np.nan)
        for part in self.gather(array):
            known = ~np.isnan(part)
            merged[known] = part[known]
        return merged

    def total(self, values: dict[str, N]) -> dict[str, N]:
        """Sums over all processes."""
        everyone = self.gather(values)
        return {name: sum(each[name] for each in everyone) for name in values}


ALONE = World()


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Meet the other processes that torchrun has started; alone without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), size, init_device_mesh(device.type, (size,)))
    except RuntimeError as error:
        if _LOST.search(str(error)) is None:
            raise
        raise TropdError(
            f"process {dist.get_rank()} of {size} has lost another one, which has ended or does not answer "
            f"({str(error).splitlines()[0]})",
            hint="the other one's message or log has the reason; the same command resumes from the last checkpoint",
        ) from error
    finally:
        dist.destroy_process_group()
