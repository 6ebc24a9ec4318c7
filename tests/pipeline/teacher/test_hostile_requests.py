"""Requests that are no honest mistakes: bombs, contradictions, false claims, and clients that go away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from running import service_info

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import SequenceScores
from tropd.pipeline.objectives.partition_specs import (
    AllTrusted,
    Partition,
    RatioPartition,
    TeacherEntropyPartition,
)
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.batcher import Batcher, StoppingError, outlier_mask
from tropd.pipeline.teacher.service.listen import listen
from tropd.pipeline.teacher.service.running import run_service
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    MAX_TOPK,
    ProtocolError,
    ScoredItem,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    log_tail,
)
from tropd.storage.errors import ConfigError, TropdError

V = 24


class FlatEngine:
    """Every token has log-prob ``value``."""

    vocab_size = V
    max_length = 64

    def __init__(self, value: float = -1.0) -> None:
        self.value = value

    def score(self, sequences: Any, starts: Any, **options: Any) -> list[SequenceScores]:
        none = np.zeros(0, dtype=np.int64)
        return [
            SequenceScores(
                np.full(len(tokens) - start, self.value, dtype=np.float32),
                None,
                none,
                np.zeros((0, 0), dtype=np.int32),
                np.zeros((0, 0), dtype=np.float32),
            )
            for tokens, start in zip(sequences, starts, strict=True)
        ]


def item(n: int = 3, student: float = -1.0) -> ScoreItem:
    return ScoreItem(np.full(n, 2, dtype=np.int32), 1, np.full(n - 1, student, dtype=np.float32), 0)


def ask(n: int = 3, partition: Partition | None = None, topk: Any = "none", k: int = 0) -> ScoreRequest:
    return ScoreRequest([item(n)], partition or AllTrusted(), topk, k, False, V)


def send(settings: ServiceConfig, use: Callable[[httpx.AsyncClient], Any]) -> Any:
    """Run ``use`` with a client of an application that is in this process."""

    async def run() -> Any:
        app = create_app(FlatEngine(), service_info(settings), settings, None)  # type: ignore[arg-type]
        try:
            transport = httpx.ASGITransport(app)
            headers = {"Content-Type": CONTENT_TYPE}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://teacher", headers=headers
            ) as http:
                return await use(http)
        finally:
            app.state.batcher.close()

    return asyncio.run(run())


def refused_request(content: bytes) -> bytes:
    """The body of an answer whose status must be 422."""

    async def use(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/score", content=content)

    answer = send(ServiceConfig(), use)
    assert answer.status_code == 422
    assert isinstance(answer.content, bytes)
    return answer.content


def test_a_body_that_unfolds_beyond_the_limit_is_refused_before_it_does() -> None:
    bomb = encode_request(ask(10_000_000))
    assert len(bomb) < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ProtocolError, match=r"8\d{7} bytes when decompressed, at most 1000000 are taken"):
        decode_request(bomb, vocab_size=V, max_length=64, max_bytes=1_000_000)
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert b"when decompressed" in refused_request(bomb)


def test_uncompressed_requests_are_measured_too() -> None:
    table = pa.ipc.open_stream(encode_request(ask(50))).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    plain = sink.getvalue().to_pybytes()
    assert len(decode_request(plain, vocab_size=V, max_length=64, max_bytes=1000).sequences[0].tokens) == 50
    with pytest.raises(ProtocolError, match="at most 300"):
        decode_request(plain, vocab_size=V, max_length=64, max_bytes=300)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(partition=TeacherEntropyPartition()), b"'teacher_entropy' needs it"),
        (ask(topk="outliers", k=0), b"needs k of at least 1"),
        (ask(topk="all", k=0), b"needs k of at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_the_senders_fault(
    request_: ScoreRequest, words: bytes
) -> None:
    assert words in refused_request(encode_request(request_))


def test_more_alternatives_than_any_objective_asks_for_are_refused() -> None:
    body = encode_request(ask(topk="all", k=MAX_TOPK))
    assert decode_request(body, vocab_size=V, max_length=64).k == MAX_TOPK
    assert b"option k" in refused_request(body.replace(b'"k":1024', b'"k":9024'))


def test_a_claimed_length_above_the_limit_is_refused_before_the_body_is_sent() -> None:
    sent: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        sent.append(b"x")
        yield b"x"

    async def use(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/score", content=body(), headers={"Content-Length": "5000"})

    assert send(ServiceConfig(max_request_bytes=4096), use).status_code == 413
    assert not sent


def test_a_client_that_goes_away_leaves_the_service_as_it_was() -> None:
    settings = ServiceConfig()
    app = create_app(FlatEngine(), service_info(settings), settings, None)  # type: ignore[arg-type]
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "query_string": b"",
        "headers": [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", b"1000")],
    }
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": True}])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def answer(message: Any) -> None:
        sent.append(message)

    async def use() -> httpx.Response:
        await app(scope, receive, answer)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as http:
            return await http.post(
                "/v1/score", content=encode_request(ask()), headers={"Content-Type": CONTENT_TYPE}
            )

    sound = asyncio.run(use())
    assert sound.status_code == 200
    assert decode_response(sound.content, ask()).teacher == "w"
    app.state.batcher.close()


def test_a_student_log_prob_that_rounding_made_positive_is_compared_as_it_is() -> None:
    # Clamped on one side only, it would be an outlier for the trainer and trusted by the service.
    asked = ScoreRequest([item(student=5e-5)], RatioPartition(), "none", 0, False, V)
    got = decode_request(encode_request(asked), vocab_size=V, max_length=64)
    teacher = np.zeros(2, dtype=np.float32)
    ours, theirs = (outlier_mask(r, r.sequences[0], teacher, None) for r in (asked, got))
    assert np.array_equal(ours, theirs)
    above = encode_request(ScoreRequest([item(student=2e-3)], RatioPartition(), "none", 0, False, V))
    with pytest.raises(ProtocolError, match="positive"):
        decode_request(above, vocab_size=V, max_length=64)


def test_alternatives_out_of_order_are_refused() -> None:
    logprobs = np.log(np.array([[0.2, 0.5]], dtype=np.float32))
    scored = ScoredItem(
        teacher_logprobs=np.full(2, -1.0, dtype=np.float32),
        trusted=np.ones(2, dtype=np.bool_),
        entropy=None,
        topk_positions=np.array([0], dtype=np.int32),
        topk_ids=np.array([[3, 4]], dtype=np.int32),
        topk_logprobs=logprobs,
        tail=log_tail(logprobs),
    )
    with pytest.raises(ProtocolError, match="falling order"):
        decode_response(encode_response(ScoreResponse([scored]), k=2, entropy=False), ask())


def test_nothing_is_accepted_that_nobody_would_answer() -> None:
    batcher = Batcher(FlatEngine(), batch_tokens=10, queue_tokens=10)  # type: ignore[arg-type]
    batcher.close()
    with pytest.raises(StoppingError):
        batcher.submit(ask())


def test_a_service_beyond_this_machine_needs_a_token_however_it_is_started() -> None:
    settings = ServiceConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="not loopback"):
        run_service(FlatEngine(), service_info(settings), settings, token=None, on_ready=print)  # type: ignore[arg-type]


def test_a_teacher_that_fails_its_self_test_never_gets_ready() -> None:
    settings = ServiceConfig()
    ready: list[str] = []
    with pytest.raises(TropdError, match=r"did not start.*gave NaN"):
        run_service(
            FlatEngine(float("nan")),  # type: ignore[arg-type]
            service_info(settings),
            settings,
            token=None,
            on_ready=ready.append,
        )
    assert not ready


def test_connections_do_not_wait_for_delayed_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(ConfigError, match="cannot listen"):
            listen("127.0.0.1", listener.getsockname()[1])
