"""Shards made by workers of Ray, on this machine or on a cluster that shares the workspace's file system.

One worker is one process with one engine. Workers write shards; this process alone writes the manifest. A worker that
dies is started again and its shard made again, by Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.ray_cluster import import_ray, ray_cluster, worker_resources
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.shard_work import Maker, Opener, ShardSpec, Work
from tropd.storage.errors import TropdError

RETRIES = 3


class _Worker:
    """Runs in a process of its own; loads its engine when the first shard comes."""

    def __init__(self, run: Run, open_maker: Opener) -> None:
        self._run = run
        self._open_maker = open_maker
        self._maker: Maker | None = None

    def make(self, number: int, folder: Path) -> tuple[int, dict[str, int]]:
        if self._maker is None:
            self._maker = self._open_maker(self._run)
        return number, self._maker(number, folder, lambda units: None)


def make_with_ray(
    run: Run, work: Work, missing: Sequence[ShardSpec], folder: Path, workers: int
) -> Iterator[tuple[ShardSpec, dict[str, int]]]:
    """Yield each missing shard with its outputs' row counts as it is made, in any order.

    Raises:
        ConfigError: Ray is not installed.
        TropdError: a worker died again and again, or raised this itself.
    """
    ray = import_ray()
    from ray.util import ActorPool

    resources = worker_resources(run.config.runtime.device)
    actor = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, **resources)(_Worker)
    specs = {spec.number: spec for spec in missing}
    silent = replace(run, reporter=SILENT)
    try:
        with ray_cluster(ray):
            some = range(min(workers, len(missing)))
            pool = ActorPool([actor.remote(silent, work.open_maker) for _ in some])
            for number, rows in pool.map_unordered(lambda a, n: a.make.remote(n, folder), list(specs)):
                yield specs[number], rows
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, TropdError) else TropdError(str(error)) from error
    except ray.exceptions.RayActorError as error:
        raise TropdError(
            f"a worker died {RETRIES + 1} times: {error}",
            hint="see Ray's logs for the reason (often memory); what was finished is kept",
        ) from error
