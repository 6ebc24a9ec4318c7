"""The processes of a command, one per GPU: ranks that train together, or parts of a stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tropd.pipeline.config.sections.value_types import Device
from tropd.pipeline.run.processes.child_environment import child_environment, device_variables, is_rank
from tropd.pipeline.run.processes.together import Child, run_together
from tropd.pipeline.run.progress import Reporter
from tropd.storage.errors import ConfigError

RESUMES = "finished work is kept: the same command resumes; "
TOO_MUCH = RESUMES + "killed processes are often short of memory, of which tropd plan --gpus N shows the need"


def number_of_gpus(wanted: int | None, device: Device, reporter: Reporter) -> int:
    """Processes to work with, each with a GPU of its own: as many as are wanted, or as GPUs are visible; at least one.

    A process that a launcher has started works alone or with its peers, and starts no others. Without a GPU, several
    processes are possible too, on the CPU.

    Raises:
        ConfigError: more than are visible, or both ``--gpus`` and a launcher.
    """
    if is_rank():
        if wanted is not None:
            raise ConfigError(
                "--gpus starts processes, but this one has been started by torchrun",
                hint="leave out --gpus, or torchrun",
            )
        return 1
    visible = _visible(device)
    if wanted is None:
        return max(1, visible)
    if visible and wanted > visible:
        raise ConfigError(
            f"--gpus {wanted}: only {visible} {'GPU is' if visible == 1 else 'GPUs are'} visible",
            hint=f"--gpus {visible}; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}",
        )
    if not visible and wanted > 1:
        reporter.info(f"no GPU is visible: {wanted} processes on the CPU")
    return wanted


def run_ranks(command: Sequence[str], count: int, logs: Path, name: str, *, shown: bool) -> int:
    """Run a command in processes that meet each other as those of torchrun do; see ``run_together``.

    Args:
        logs: folder of ``<name>-rank-<n>.log``, the output of all but the first.
        shown: the first one talks to this process's terminal; otherwise it has a log, too.
    """
    import torch.distributed as dist

    # The store is here, so that its port is taken from the start.
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    common = child_environment(one_device=False)
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    children = [
        Child(
            f"process {rank}",
            command,
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            None if shown and rank == 0 else logs / f"{name}-rank-{rank}.log",
        )
        for rank in range(count)
    ]
    return run_together(name, children, TOO_MUCH)


def run_parts(
    command: Sequence[str],
    count: int,
    logs: Path,
    name: str,
    *,
    devices_each: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run ``command --shards i/count`` for every i at the same time, each with GPUs of its own; see ``run_together``.

    Args:
        logs: folder of ``<name>-part-<i>.log``, their output.
    """
    children = []
    for index in range(count):
        first = index * devices_each
        seen = [
            device_variables(number)["CUDA_VISIBLE_DEVICES"] for number in range(first, first + devices_each)
        ]
        environment = child_environment(one_device=False) | {
            "CUDA_VISIBLE_DEVICES": ",".join(filter(None, seen))
        }
        children.append(
            Child(
                f"part {index + 1}",
                [*command, "--shards", f"{index + 1}/{count}"],
                environment,
                logs / f"{name}-part-{index + 1}.log",
            )
        )
    run_together(name, children, RESUMES + "see the log", tick=tick)


def _visible(device: Device) -> int:
    import torch

    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
