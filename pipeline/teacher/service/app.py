"""The teacher-scoring service: FastAPI around one engine, Arrow in and out (see ``messages``)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.requests import ClientDisconnect

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.teacher.service.access_log import Access, AccessLog, Timing
from tropd.pipeline.teacher.service.batcher import Batcher, QueueFullError, StoppingError, TeacherOutputError
from tropd.pipeline.teacher.service.self_test import self_test
from tropd.pipeline.teacher.wire.headers import (
    ALONE_HEADER,
    CLIENT_HEADER,
    QUEUE_HEADER,
    QUEUED,
    REQUEST_HEADER,
    REQUESTS_PATH,
    WORKING,
)
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import CONTENT_TYPE, ProtocolError, decode_request, encode_response
from tropd.storage.errors import MemoryFullError

T = TypeVar("T")
logger = logging.getLogger(__name__)
RETRY_AFTER_SECONDS = 1
PROBES = ("/healthz", "/readyz")
"""Paths without a token, and without a line in the access log."""
BODY_IDLE_SECONDS = 10.0
"""A body that stops arriving for this long is given up."""
MOST_NAME = 64
"""Characters that count of the names that clients give themselves and their requests."""
STUCK_SECONDS = 1.0
"""Time limit of a batch that outlasts the grace of a stopping service; no client is left to get its answers."""


class _Metrics:
    """Prometheus metrics of one application, in a registry of their own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tropd_requests", "Answered requests", ["status"], registry=self.registry)
        self.tokens = Counter("tropd_scored_tokens", "Tokens scored", registry=self.registry)
        self.topk = Counter("tropd_topk_tokens", "Tokens with alternatives", registry=self.registry)
        self.bytes_in = Counter("tropd_bytes_received", "Bytes of requests", registry=self.registry)
        self.bytes_out = Counter("tropd_bytes_sent", "Bytes of answers", registry=self.registry)
        self.seconds = Histogram("tropd_request_seconds", "Time to answer", registry=self.registry)
        self.batch = Histogram(
            "tropd_batch_tokens",
            "Tokens of a forward batch",
            buckets=[2**n for n in range(6, 19)],
            registry=self.registry,
        )
        Gauge("tropd_waiting_tokens", "Tokens in the queue", registry=self.registry).set_function(waiting)


def create_app(
    engine: Engine,
    info: ServiceInfo,
    settings: ServiceConfig,
    token: str | None,
    access_log: AccessLog = lambda access: None,
) -> FastAPI:
    """The application. The engine is used by one thread only; ``/readyz`` answers after a self-test score."""
    batcher = Batcher(
        engine,
        batch_tokens=settings.batch_tokens,
        queue_tokens=settings.queue_tokens,
        on_batch=lambda sequences, tokens, seconds: metrics.batch.observe(tokens),
    )
    metrics = _Metrics(lambda: batcher.waiting_tokens)
    stopping = asyncio.Event()
    under_way: dict[str, Timing] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.get_running_loop().run_in_executor(None, self_test, engine)
        except Exception as error:
            app.state.failure = str(error) or type(error).__name__
            raise
        app.state.ready = True
        yield
        app.state.ready = False
        grace = STUCK_SECONDS if stopping.is_set() else settings.stop_seconds
        await asyncio.get_running_loop().run_in_executor(None, batcher.close, grace)

    app = FastAPI(title="tropd teacher", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.ready, app.state.failure = False, ""
    app.state.batcher, app.state.stopping = batcher, stopping

    @app.middleware("http")
    async def observe(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.monotonic()
        client = request.client.host if request.client else "unknown"
        access = request.state.access = Access(client, request.method, request.url.path)
        probe = request.url.path in PROBES
        if probe or _authorized(request, token):
            response = await call_next(request)
        else:
            access.error = "a bearer token is needed"
            response = _error(401, access.error)
        metrics.requests.labels(status=str(response.status_code)).inc()
        seconds = time.monotonic() - started
        if request.url.path == "/v1/score":
            metrics.seconds.observe(seconds)
        if not probe and not request.url.path.startswith(REQUESTS_PATH):
            access.status, access.total_ms = response.status_code, seconds * 1000
            access.bytes_out = int(response.headers.get("content-length", 0))
            access_log(access)
        return response

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        return JSONResponse({"status": "ready"}) if app.state.ready else _error(503, "not ready")

    @app.get("/v1/info")
    async def get_info() -> ServiceInfo:
        return info

    @app.get(f"{REQUESTS_PATH}/{{name}}")
    async def state(name: str) -> Response:
        timing = under_way.get(name)
        if timing is None:
            return _error(404, "no such request is under way")
        return JSONResponse({"state": QUEUED if timing.queue_ms is None else WORKING})

    @app.get("/metrics")
    async def get_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        access: Access = request.state.access

        def refused(status: int, message: str, **details: Any) -> JSONResponse:
            access.error = message
            return _error(status, message, **details)

        if request.headers.get("content-type", "").split(";")[0].strip() != CONTENT_TYPE:
            return refused(415, f"the content type must be {CONTENT_TYPE}")
        try:
            body = await _unless_stopping(_read_body(request, settings), stopping, 0.0)
        except ClientDisconnect:
            return refused(400, "the body ended early")
        except (TimeoutError, StoppingError) as error:
            response = refused(408 if isinstance(error, TimeoutError) else 503, str(error))
            response.headers["Connection"] = "close"
            return response
        if body is None:
            return refused(413, f"the body is above {settings.max_request_bytes} bytes")
        metrics.bytes_in.inc(len(body))
        access.bytes_in = len(body)
        try:
            asked = decode_request(
                body,
                vocab_size=engine.vocab_size,
                max_length=engine.max_length,
                max_bytes=settings.max_request_bytes,
                max_chosen=info.max_chosen,
            )
            tokens = sum(len(item.tokens) for item in asked.sequences)
            access.items, access.tokens = len(asked.sequences), tokens
            if tokens > settings.max_request_tokens:
                raise ProtocolError(f"{tokens} tokens, a request may have {settings.max_request_tokens}")
        except ProtocolError as error:
            return refused(422, str(error), sequence=error.sequence)
        timing = Timing()
        name = request.headers.get(REQUEST_HEADER, "")[:MOST_NAME]
        try:
            client = request.headers.get(CLIENT_HEADER, "")[:MOST_NAME]
            alone = ALONE_HEADER in request.headers
            scored = asyncio.wrap_future(batcher.submit(asked, timing, client, alone))
            under_way[name] = timing
            answer = await _unless_stopping(scored, stopping, settings.stop_seconds)
        except QueueFullError as error:
            response = refused(429, str(error))
            response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
            return response
        except StoppingError as error:
            return refused(503, str(error))
        except (TeacherOutputError, MemoryFullError) as error:
            return refused(500, str(error))
        except Exception as error:
            return refused(500, f"scoring failed: {type(error).__name__}")
        finally:
            if under_way.get(name) is timing:
                del under_way[name]
            access.queue_ms, access.engine_ms = timing.queue_ms, timing.engine_ms
        k = max((item.topk_ids.shape[1] for item in answer.items), default=0)
        content = encode_response(
            replace(answer, teacher=info.weights), k=k, entropy=asked.entropy, chosen=asked.chosen > 0
        )
        metrics.tokens.inc(sum(len(item.teacher_logprobs) for item in answer.items))
        metrics.topk.inc(sum(len(item.topk_positions) for item in answer.items))
        metrics.bytes_out.inc(len(content))
        queued = {QUEUE_HEADER: f"{timing.queue_ms or 0.0:.3f}"}
        return Response(content, media_type=CONTENT_TYPE, headers=queued)

    return app


def _authorized(request: Request, token: str | None) -> bool:
    if token is None:
        return True
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _read_body(request: Request, settings: ServiceConfig) -> bytes | None:
    """The body, or None if it is longer than ``max_request_bytes``, whatever its header claims.

    Raises:
        TimeoutError: it stopped arriving, or all of it took longer than ``body_seconds``.
    """
    deadline = asyncio.get_running_loop().time() + settings.body_seconds
    limit = settings.max_request_bytes
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed) > limit:  # refused before it is sent
        return None
    parts: list[bytes] = []
    stream, size = aiter(request.stream()), 0
    while True:
        left = deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(BODY_IDLE_SECONDS, left)):
                part = await anext(stream, None)
        except TimeoutError:
            if left < BODY_IDLE_SECONDS:
                raise TimeoutError(f"the body took longer than {settings.body_seconds:g} s") from None
            raise TimeoutError(f"no part of the body arrived for {BODY_IDLE_SECONDS:g} s") from None
        if part is None:
            return b"".join(parts)
        size += len(part)
        if size > limit:
            return None
        parts.append(part)


async def _unless_stopping(work: Awaitable[T], stopping: asyncio.Event, grace: float) -> T:
    """The result of ``work``, if it comes before the service has been stopping for ``grace`` seconds.

    Raises:
        StoppingError: it did not, and was canceled.
    """
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=grace)
        if not task.done():
            raise StoppingError("the service is stopping")
        return task.result()
    finally:
        stop.cancel()
        task.cancel()


def _error(status: int, message: str, **details: Any) -> JSONResponse:
    return JSONResponse({"error": message, **details}, status_code=status)
