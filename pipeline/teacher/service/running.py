"""Running the teacher service until it is asked to stop, or its parent ends."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.teacher.service.access_log import AccessLog
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.connections import serve_within, server_for
from tropd.pipeline.teacher.service.listen import check_address, listen
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.storage.errors import TropdError


def run_service(
    engine: Engine,
    info: ServiceInfo,
    settings: ServiceConfig,
    *,
    token: str | None,
    on_ready: Callable[[str], None],
    exit_with_parent: bool = False,
    access_log: AccessLog = lambda access: None,
) -> None:
    """Serve until SIGTERM or SIGINT, answering the queue first, if it takes no longer than ``stop_seconds``.

    Args:
        on_ready: called with the URL once the service answers.
        exit_with_parent: also stop when standard input ends, which it does if the process that started this dies.
        access_log: called with every request.

    Raises:
        ConfigError: the address is not loopback and no token is set, or it is not available.
        TropdError: the self-test failed.
    """
    check_address(settings.host, token)
    listener = listen(settings.host, settings.port)
    app = create_app(engine, info, settings, token, access_log)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    server = server_for(app, settings)
    threading.Thread(
        target=_announce, args=(server, app, f"http://{host}:{port}", on_ready), daemon=True
    ).start()
    if exit_with_parent:
        threading.Thread(target=_watch_stdin, args=(server,), daemon=True).start()
    try:
        asyncio.run(serve_within(server, listener, settings, app.state.stopping))
    except KeyboardInterrupt:
        pass  # uvicorn has stopped as it was asked to, and passes the signal on
    except (
        SystemExit
    ):  # how newer versions of uvicorn end when the application does not start; older ones return
        if not app.state.failure:
            raise
    finally:
        listener.close()
    if app.state.failure:
        raise TropdError(
            f"the teacher service did not start, its self-test failed: {app.state.failure}",
            hint="load the model with transformers and look at its logits",
        )


def _announce(server: uvicorn.Server, app: FastAPI, url: str, on_ready: Callable[[str], None]) -> None:
    while not (server.started and app.state.ready):
        if server.should_exit or app.state.failure:
            return
        time.sleep(0.02)
    on_ready(url)


def _watch_stdin(server: uvicorn.Server) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    server.should_exit = True
