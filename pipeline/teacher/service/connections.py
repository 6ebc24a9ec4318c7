"""Deadlines of the service's connections against clients that are slow, silent or many, also when it stops.

uvicorn limits only how long a connection may be idle between two requests. Everything else that a client can delay is
limited here: the header of a request, reading an answer, and the number of connections. The deadline of a body is
the application's (``app``), which can say so in an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn

from tropd.pipeline.config.sections.model_settings import ServiceConfig

TICK_SECONDS = 0.1
LAST_WORDS_SECONDS = 1.0
"""Time a client has to read its answer once the service is stopping."""

ConnectionPhase = Literal["header", "body", "work", "answer"]


@dataclass(frozen=True)
class _Since:
    """The phase a connection waits in, its request, and since when (monotonic seconds)."""

    phase: ConnectionPhase
    cycle: Any
    time: float


def server_for(app: Any, settings: ServiceConfig) -> uvicorn.Server:
    """The server of an application, to be run by ``serve_within``."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            http="h11",
            ws="none",
            timeout_graceful_shutdown=math.ceil(settings.stop_seconds + 2 * LAST_WORDS_SECONDS),
        )
    )


async def serve_within(
    server: uvicorn.Server, listener: socket.socket, settings: ServiceConfig, stopping: asyncio.Event
) -> None:
    """Serve until the server is asked to exit; ``stopping`` is set as soon as it is."""
    watch = asyncio.create_task(_watch(server, settings, stopping))
    try:
        await server.serve(sockets=[listener])
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def _watch(server: uvicorn.Server, settings: ServiceConfig, stopping: asyncio.Event) -> None:
    seen: dict[Any, _Since] = {}
    while True:
        if server.should_exit:
            stopping.set()
        now = time.monotonic()
        seen = {connection: _since(connection, seen, now) for connection in server.server_state.connections}
        for connection in _overdue(seen, now, settings, stopping=stopping.is_set()):
            connection.transport.abort()
        await asyncio.sleep(TICK_SECONDS)


def _since(connection: Any, seen: dict[Any, _Since], now: float) -> _Since:
    phase, before = _phase(connection), seen.get(connection)
    if before is not None and before.phase == phase and before.cycle is connection.cycle:
        return before
    return _Since(phase, connection.cycle, now)


def _phase(connection: Any) -> ConnectionPhase:
    """The phase a connection waits in: for a header (or a next request), a body, our own work, or its reader."""
    if connection.transport.get_write_buffer_size():
        return "answer"
    cycle = connection.cycle
    if cycle is None or cycle.response_complete:
        return "header"
    return "body" if cycle.more_body else "work"


def _overdue(seen: dict[Any, _Since], now: float, settings: ServiceConfig, *, stopping: bool) -> list[Any]:
    """Connections to be cut: late ones, and of too many those that have sent the least for longest."""
    reading = LAST_WORDS_SECONDS if stopping else settings.answer_seconds
    limits = {"header": settings.header_seconds, "answer": reading}
    late = [c for c, since in seen.items() if now - since.time > limits.get(since.phase, float("inf"))]
    excess = len(seen) - len(late) - settings.max_connections
    if excess > 0:
        order: dict[ConnectionPhase, int] = {"header": 0, "body": 1, "answer": 2}
        rest = [c for c in seen.keys() - late if seen[c].phase in order]
        late += sorted(rest, key=lambda c: (order[seen[c].phase], seen[c].time))[:excess]
    return late
