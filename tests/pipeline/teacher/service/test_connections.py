"""Clients that drip, wait and crowd: they lose their connections, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response
from waiting import eventually

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.teacher.service.connections import serve_within, server_for
from tropd.pipeline.teacher.service.listen import listen
from tropd.pipeline.teacher.wire.messages import CONTENT_TYPE

BIG = 32 << 20


def plain_app() -> FastAPI:
    """Answers at once, with much or little."""
    app = FastAPI()
    app.state.stopping = asyncio.Event()

    @app.get("/healthz")
    async def healthz() -> str:
        return "alive"

    @app.get("/big")
    async def big() -> Response:
        return Response(bytes(BIG))

    return app


@contextlib.contextmanager
def served(
    settings: ServiceConfig, app: Any = None
) -> Iterator[tuple[str, uvicorn.Server, threading.Thread]]:
    """A service in a thread; yields its URL, its server and its thread."""
    app = app or plain_app()
    with listen("127.0.0.1", 0) as listener:
        server = server_for(app, settings)

        def run() -> None:
            asyncio.run(serve_within(server, listener, settings, app.state.stopping))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        eventually(lambda: server.started, 20, "the server is up")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def connect(url: str, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0))
    connection.settimeout(20)
    connection.sendall(content)
    return connection


def drip(connection: socket.socket, content: bytes, seconds: float = 10.0) -> tuple[bytes, float]:
    """Send a byte every 50 ms until the other side has had enough; what it said, and after how many seconds."""
    started = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in content:
            connection.sendall(bytes([byte]))
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                return _all(connection, connection.recv(4096)), time.monotonic() - started
            if time.monotonic() - started > seconds:
                pytest.fail("nobody minded")
    return b"", time.monotonic() - started


def _all(connection: socket.socket, said: bytes) -> bytes:
    """The rest of an answer too, which may come in pieces."""
    with contextlib.suppress(OSError):
        while said and (more := connection.recv(4096)):
            said += more
    return said


def test_a_header_that_drips_is_cut_and_others_are_served() -> None:
    with served(ServiceConfig(header_seconds=0.5)) as (url, _, _), connect(url) as slow:
        said, seconds = drip(slow, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 1000)
        assert said == b""
        assert 0.3 < seconds < 8
        with httpx.Client(base_url=url) as client:  # requests one after another have a deadline each
            started = time.monotonic()
            while time.monotonic() - started < 0.8:
                assert client.get("/healthz").status_code == 200
                time.sleep(0.05)


def test_a_second_request_has_a_deadline_too() -> None:
    with served(ServiceConfig(header_seconds=0.5)) as (url, _, _):
        with connect(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as slow:
            answer = b""
            while not answer.endswith(b'"alive"'):
                answer += slow.recv(4096)
            said, _ = drip(slow, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 1000)
            assert said == b""


def test_a_body_that_drips_is_refused(service_app: Any) -> None:
    settings = ServiceConfig(body_seconds=0.5)
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 4000\r\n\r\n"
    )
    with served(settings, service_app(settings)) as (url, _, _), connect(url, head.encode()) as slow:
        said, seconds = drip(slow, b"x" * 1000)
        assert said.startswith(b"HTTP/1.1 408")
        assert b"took longer than 0.5 s" in said
        assert 0.3 < seconds < 8


def test_an_answer_that_nobody_reads_is_dropped() -> None:
    with served(ServiceConfig(answer_seconds=0.5)) as (url, server, _):
        with connect(url, b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n"):
            eventually(lambda: len(server.server_state.connections) == 1, 20, "there is a connection")
            eventually(lambda: not server.server_state.connections, 20, "the connection is dropped")
        assert len(httpx.get(f"{url}/big").content) == BIG


def test_many_slow_clients_do_not_keep_others_out() -> None:
    with served(ServiceConfig(max_connections=5)) as (url, server, _), contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(url, b"GET /healthz HTTP/1.1\r\nHo"))
        for _ in range(5):
            assert httpx.get(f"{url}/healthz").status_code == 200
        eventually(lambda: len(server.server_state.connections) <= 5, 20, "slow clients are dropped")


def test_the_end_waits_for_no_reader() -> None:
    with served(ServiceConfig()) as (url, server, thread):
        with (
            connect(url, b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n") as stuck,
            connect(url),
            connect(url, b"GET /"),
        ):
            assert stuck.recv(12) == b"HTTP/1.1 200"
            server.should_exit = True
            started = time.monotonic()
            thread.join(20)
            assert not thread.is_alive()
            assert time.monotonic() - started < 8  # 1 s, on a machine that has other things to do


@pytest.fixture
def service_app(table_engine: Any) -> Callable[[ServiceConfig], FastAPI]:
    from tropd.pipeline.teacher.service.app import create_app
    from tropd.pipeline.teacher.wire.info import ServiceInfo

    def make(settings: ServiceConfig) -> FastAPI:
        info = ServiceInfo(
            model="toy",
            weights="w",
            tokenizer="t",
            tokenizer_size=24,
            vocab_size=24,
            max_length=64,
            max_request_tokens=settings.max_request_tokens,
            max_request_bytes=settings.max_request_bytes,
            queue_tokens=settings.queue_tokens,
        )
        return create_app(table_engine, info, settings, None)

    return make
