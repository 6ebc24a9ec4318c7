"""The teacher service on a cluster: replicas behind Ray Serve's proxy, which has one address and restarts the dead.

The workspace must be on a file system that all machines share. Each replica is a service as ``serve-teacher`` starts
it, with an engine, a queue and a self-test of its own; the proxy passes requests on.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tropd.pipeline.run.interrupt import StopRequest, StopRequestedError, stop_on_signal
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.ray_cluster import ray_cluster, worker_resources
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.listen import check_address, listen
from tropd.pipeline.teacher.service.serve import ACCESS_LOG, load_service
from tropd.storage.errors import ConfigError, TropdError

NAME = "tropd-teacher"
REQUESTS_PER_REPLICA = 64
"""Most requests that a replica has at once: enough for its batcher to choose from."""


def serve_on_ray(run: Run, on_ready: Callable[[str], None], replicas: int) -> None:
    """Deploy the service, and keep it up until SIGTERM or SIGINT.

    Raises:
        ConfigError: Ray Serve is not installed, or the address is not loopback and no token is set.
        TropdError: no replica passes its self-test.
    """
    settings = run.config.service
    token = os.environ.get(run.config.teacher.token_env) or None
    check_address(settings.host, token, run.config.teacher.token_env)
    with listen(settings.host, settings.port) as probe:  # the proxy wants a number, also where any will do
        port = probe.getsockname()[1]
    ray, ray_serve = _import_ray_serve()
    silent = replace(run, reporter=SILENT)

    def build() -> Any:
        """The application of one replica, made where it runs."""
        from tropd.pipeline.teacher.service.access_log import open_access_log

        engine, info = load_service(silent)
        log = silent.workspace.logs / ACCESS_LOG.replace(".", f".{socket.gethostname()}.", 1)
        return create_app(engine, info, settings, token, open_access_log(log))

    quiet = {"log_level": "WARNING", "enable_access_log": False}  # we have our own log
    with ray_cluster(ray), _serving(ray_serve):
        ray_serve.start(http_options={"host": settings.host, "port": port}, logging_config=quiet)
        deployment = ray_serve.deployment(
            ray_serve.ingress(build)(),
            name=NAME,
            num_replicas=replicas,
            max_ongoing_requests=REQUESTS_PER_REPLICA,
            ray_actor_options=worker_resources(run.config.runtime.device),
            logging_config=quiet,
        )
        ray_serve.run(deployment.bind(), name=NAME, route_prefix="/", logging_config=quiet)
        with stop_on_signal(StopRequest()) as stop:  # only now: Ray has taken SIGTERM for itself
            on_ready(f"http://{settings.host}:{port}")
            with contextlib.suppress(StopRequestedError):
                stop.sleep(math.inf)


@contextlib.contextmanager
def _serving(ray_serve: Any) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TropdError(
            f"the teacher service did not start on Ray: {error}",
            hint="tropd serve-teacher without --executor ray shows the reason; so do Ray's logs",
        ) from error
    finally:
        ray_serve.shutdown()


def _import_ray_serve() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError(
            "serve-teacher --executor ray needs Ray Serve, which is not installed",
            hint='pip install "tropd[ray-serve]"',
        ) from None
    return ray, serve
