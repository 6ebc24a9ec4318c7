"""Processes that train together, on the nodes of a Ray cluster.

Ray only chooses the places: a placement group has a bundle for each process, on as few nodes as possible. In each place
an actor runs the process as ``together`` runs those of one machine, and ends it when it is told to, or when it is gone
itself. Each process sees the GPUs that its node gives to the run, and its own number among them, as under torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd.pipeline.config.sections.value_types import Device
from tropd.pipeline.run.processes.child_environment import FOLLOWS, VISIBLE, child_environment
from tropd.pipeline.run.processes.gpus import TOO_MUCH
from tropd.pipeline.run.processes.together import Child, Running, run_together
from tropd.pipeline.run.ray_cluster import import_ray, ray_cluster
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, TropdError

PLACEMENT_SECONDS = 60.0
"""Time for other work of the cluster to make room."""
CALL_SECONDS = 60.0
_HANDED_ON = ("TROPD_", "HF_", "WANDB_", "NCCL_", "GLOO_", "OMP_")
"""Beginnings of the names of variables that processes have from the one that starts them, not from their node."""


@dataclass(frozen=True)
class RankPlace:
    """A place for a process, as its actor sees it."""

    node: str
    host: str
    address: str
    visible: str
    """Its GPU, as CUDA names it."""
    shares: bool
    """Whether the file of the one that starts the processes is there."""


class _Seat:
    """The actor of a place."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None
        self._store: Any = None

    def look(self, proof: Path) -> RankPlace:
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        visible = os.environ.get(VISIBLE, "")
        return RankPlace(context.get_node_id(), socket.gethostname(), address, visible, proof.exists())

    def keep_store(self, address: str) -> int:
        """Keep the store where the processes meet; returns its port."""
        import torch.distributed as dist

        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            address, 0, is_master=True, wait_for_workers=False
        )
        return int(self._store.port)

    def run(self, command: Sequence[str], variables: Mapping[str, str], folder: str, log: Path) -> int:
        """Run the process to its end; returns its exit code."""
        environment = child_environment(one_device=False)
        # Ray sets it to the CPUs that were asked for, which are for counting only.
        threads = max(1, (os.cpu_count() or 1) // int(variables["LOCAL_WORLD_SIZE"]))
        environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command[1:]],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**environment, **variables, FOLLOWS: "1"},
                cwd=folder if Path(folder).is_dir() else None,
                start_new_session=True,
            )
        if self._asked is not None:
            self._process.send_signal(self._asked)
        return self._process.wait()

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        self._asked = number
        if self._process is not None:
            self._process.send_signal(number)


class _Remote:
    """The process of a seat, with the methods of ``subprocess.Popen`` that ``run_together`` uses."""

    def __init__(self, ray: Any, seat: Any, ended: Any) -> None:
        self.returncode: int | None = None
        self._ray, self._seat, self._ended = ray, seat, ended

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a process on Ray", timeout or 0.0)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(self._seat.send.remote(number), timeout=CALL_SECONDS)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and self._ray.wait([self._ended], timeout=seconds)[0]:
            try:
                self.returncode = int(self._ray.get(self._ended))
            except self._ray.exceptions.RayActorError:  # its node is gone, or the actor was killed
                self.returncode = -signal.SIGKILL
        return self.returncode


def run_ranks_on_ray(command: Sequence[str], count: int, logs: Path, name: str, device: Device) -> None:
    """Run a command in processes on a Ray cluster; see ``run_together``. Without a cluster, Ray starts one here.

    Args:
        logs: folder of ``<name>-rank-<n>.log``, their output; all nodes must see it.
        device: ``cpu`` takes no GPU; ``auto`` takes GPUs if the cluster has any.

    Raises:
        ConfigError: no Ray, a cluster without enough GPUs or CPUs, or a node that does not see ``logs``.
        InterruptedStageError, TropdError: see ``run_together``.
    """
    ray = import_ray()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with ray_cluster(ray), _placed(ray, count, device) as seats:
            ranks = ranks_of(_look(ray, seats, logs))
            first, known = ranks[0]
            port = ray.get(seats[first].keep_store.remote(known["MASTER_ADDR"]))
            common = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
            common["MASTER_PORT"] = str(port)
            children, places = [], {}
            for rank, (number, variables) in enumerate(ranks):
                log = logs / f"{name}-rank-{rank}.log"
                children.append(Child(f"process {rank}", command, common | variables, log))
                places[children[-1].name] = seats[number]

            def start(child: Child) -> contextlib.AbstractContextManager[Running]:
                return _started(ray, places[child.name], child)

            run_together(name, children, TOO_MUCH, start=start)
    except ray.exceptions.RayError as error:
        raise TropdError(
            f"{name}: Ray failed: {error}", hint="Ray's logs have the reason; the same command resumes"
        ) from error


@contextlib.contextmanager
def _placed(ray: Any, count: int, device: Device) -> Iterator[list[Any]]:
    """An actor in each place; the places are given back at the end of the block."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    total = ray.cluster_resources()
    on_gpus = device != "cpu" and (device != "auto" or total.get("GPU", 0) > 0)
    bundle = {"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}
    if short := [f"{count} {kind}s" for kind in bundle if total.get(kind, 0) < count]:
        raise ConfigError(
            f"{count} processes on Ray need {' and '.join(short)}; the cluster has {_amounts(total)}",
            hint="fewer --workers, or more nodes (ray start --address=…)",
        )
    group = placement_group([bundle] * count, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_SECONDS):
            raise ConfigError(
                f"Ray found no room for {count} processes in {PLACEMENT_SECONDS:.0f} seconds: of {_amounts(total)}, "
                f"{_amounts(ray.available_resources())} are free",
                hint="wait for the cluster's other work, or take fewer --workers",
            )
        # A second thread, which can send a signal while the first waits for the process.
        actor = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0, max_concurrency=2)(_Seat)
        yield [
            actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, number)).remote()
            for number in range(count)
        ]
    finally:
        remove_placement_group(group)


def ranks_of(places: Sequence[RankPlace]) -> list[tuple[int, dict[str, str]]]:
    """The places by rank, node by node: the number of each, and the variables of its process.

    The first node has the most processes: what process 0 finds out about memory holds for all.
    """
    on_node = Counter(place.node for place in places)
    order = sorted(enumerate(places), key=lambda one: (-on_node[one[1].node], one[1].node, one[1].visible))
    common = {
        "MASTER_ADDR": order[0][1].address,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(len(places)),
        "LOCAL_WORLD_SIZE": str(max(on_node.values())),
    }
    found = []
    seated: Counter[str] = Counter()
    for rank, (number, place) in enumerate(order):
        own = {"RANK": str(rank), "LOCAL_RANK": str(seated[place.node])}
        own[VISIBLE] = ",".join(one.visible for _, one in order if one.node == place.node and one.visible)
        seated[place.node] += 1
        found.append((number, common | own))
    return found


def _look(ray: Any, seats: Sequence[Any], logs: Path) -> list[RankPlace]:
    """The places of the seats.

    Raises:
        ConfigError: a node does not see this process's files.
    """
    proof = logs / f".seen-{uuid.uuid4().hex}"
    write_text_atomic(proof, "")
    try:
        places: list[RankPlace] = ray.get([seat.look.remote(proof) for seat in seats])
    finally:
        proof.unlink(missing_ok=True)
    blind = sorted({place.host for place in places if not place.shares})
    if blind:
        raise ConfigError(
            f"{logs} of this machine is not there on {', '.join(blind)}",
            hint="put the workspace on a file system that all nodes share, under the same path",
        )
    return places


@contextlib.contextmanager
def _started(ray: Any, seat: Any, child: Child) -> Iterator[Running]:
    assert child.log is not None
    start = child.log.stat().st_size if child.log.exists() else 0
    ended = seat.run.remote(list(child.command), dict(child.environment), os.getcwd(), child.log)
    process = _Remote(ray, seat, ended)
    try:
        yield Running(child, process, start)
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CALL_SECONDS)


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
