"""A Ray cluster for as long as a block runs: the one that this process is part of, or its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tropd.pipeline.config.sections.value_types import Device
from tropd.pipeline.models.runtime import pick_device
from tropd.storage.errors import ConfigError


def import_ray() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ConfigError(
            "--executor ray needs Ray, which is not installed", hint='pip install "tropd[ray]"'
        ) from None
    return ray


@contextmanager
def ray_cluster(ray: Any) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine and stop it at the end. ``ray`` is the library."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def worker_resources(device: Device) -> dict[str, int]:
    """Resources of an actor with one engine on a device (``runtime.device``)."""
    return {"num_cpus": 1, "num_gpus": 1 if pick_device(device).type == "cuda" else 0}
