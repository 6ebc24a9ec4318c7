"""The service over real HTTP under bad requests and many clients at once, with answers that are known."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from running import service_info
from waiting import eventually

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.partition_specs import NoneTrusted, RatioPartition, SampledPartition
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service import app as service_module
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.listen import listen
from tropd.pipeline.teacher.service.running import run_service
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    ScoreItem,
    ScoreRequest,
    decode_response,
    encode_request,
)
from tropd.storage.errors import ConfigError, TropdError

V = 24
HEADERS = {"Content-Type": CONTENT_TYPE}


@contextmanager
def serving(engine: Any, settings: ServiceConfig | None = None, token: str | None = None) -> Iterator[str]:
    """A service in a thread; yields its URL."""
    settings = settings or ServiceConfig()
    app = create_app(engine, service_info(settings), settings, token)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started and app.state.ready, 20, "the service is ready")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def item(tokens: list[int], start: int = 1, **changes: Any) -> ScoreItem:
    student = np.full(max(len(tokens) - start, 0), -2.0, dtype=np.float32)
    return replace(ScoreItem(np.array(tokens, dtype=np.int32), start, student, 5), **changes)


def ask(*items: ScoreItem, topk: Any = "outliers", k: int = 4) -> ScoreRequest:
    return ScoreRequest(items, SampledPartition(), topk, k, False, V)


def waiting_tokens(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(
        next(line for line in text.splitlines() if line.startswith("tropd_waiting_tokens")).split()[1]
    )


def test_bad_requests_are_refused_and_good_ones_answered_all_the_while(table_engine: Any) -> None:
    generator = np.random.default_rng(0)
    tokens = [3, 9, 4, 11]
    good = ask(item(tokens))
    body = encode_request(good)
    nan, infinite = (np.array([x], dtype=np.float32) for x in (np.nan, np.inf))
    faulty = [
        item([2, V]),
        item([2, -3]),
        item([2, 3], seed=-1),
        item([2, 3], student_logprobs=nan),
        item([2, 3], student_logprobs=-infinite),
        item([2, 3], 2),
        item([2] * 65),
    ]
    scored = 0
    with serving(table_engine) as url, httpx.Client(base_url=url, headers=HEADERS) as http:
        for trial in range(1, 501):
            place = -1
            if trial % 2:
                place = trial % 3
                bad = encode_request(ask(*[item([2, 3])] * place, faulty[trial % len(faulty)], item([4, 5])))
            elif trial % 4:
                bad = body[: int(generator.integers(len(body) - 8))]
            else:
                bad = generator.bytes(int(generator.integers(300)))
            answer = http.post("/v1/score", content=bad)
            assert answer.status_code == 422, (trial, answer.text)
            assert answer.json()["error"]
            assert answer.json()["sequence"] == (place if place >= 0 else None)
            if trial % 100 == 0:
                sound = http.post("/v1/score", content=body)
                got = decode_response(sound.content, good).items[0].teacher_logprobs
                assert np.array_equal(got, table_engine.expected(tokens, 1))
                scored += 1
    assert len(table_engine.calls) == 2 + scored  # the self-test; nothing bad reached the engine


def test_other_paths_methods_and_types_are_refused(table_engine: Any) -> None:
    body = encode_request(ask(item([2, 3])))
    with serving(table_engine) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/score").status_code == 405
        assert http.post("/v1/other", content=body, headers=HEADERS).status_code == 404
        for kind in ("application/json", "text/plain", "", CONTENT_TYPE + "x"):
            answer = http.post("/v1/score", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 415
            assert CONTENT_TYPE in answer.json()["error"]
        assert http.post("/v1/score", content=b"", headers=HEADERS).status_code == 422
        with_charset = {"Content-Type": f"{CONTENT_TYPE}; charset=binary"}
        assert http.post("/v1/score", content=body, headers=with_charset).status_code == 200


def test_a_body_that_stops_arriving_is_given_up(table_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BODY_IDLE_SECONDS", 0.2)
    with serving(table_engine) as url, socket.socket() as connection:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", httpx.URL(url).port))
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"a beginning")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # to its end: the service closes
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no part of the body arrived" in answer


def test_a_body_that_arrives_slowly_is_taken(table_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BODY_IDLE_SECONDS", 0.5)
    body = encode_request(ask(item([2, 3])))

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(body), len(body) // 8):
            time.sleep(0.1)
            yield body[at : at + len(body) // 8]

    with serving(table_engine) as url:
        assert httpx.post(f"{url}/v1/score", content=pieces(), headers=HEADERS).status_code == 200


def test_a_request_of_no_sequences_is_answered(tiny_model: Any) -> None:
    request = ask()
    with serving(TransformersEngine(tiny_model, [1])) as url:
        answer = httpx.post(f"{url}/v1/score", content=encode_request(request), headers=HEADERS)
    assert answer.status_code == 200
    assert decode_response(answer.content, request).items == []


def test_answers_to_clients_at_once_are_never_mixed_up(table_engine: Any) -> None:
    def converse(number: int) -> int:
        generator = np.random.default_rng(number)
        with TeacherClient(url, timeout_seconds=30) as client:
            for _ in range(12):
                items = []
                for _ in range(int(generator.integers(1, 4))):
                    tokens = generator.integers(0, 22, size=int(generator.integers(2, 30))).tolist()
                    items.append(item(tokens, int(generator.integers(1, len(tokens))), seed=number))
                answer = client.score(ask(*items, k=2 + number % 2))
                for asked, got in zip(items, answer.items, strict=True):
                    expected = table_engine.expected(asked.tokens.tolist(), asked.start)
                    assert np.array_equal(got.teacher_logprobs, expected)
            return client.tokens_scored

    with serving(table_engine, ServiceConfig(queue_tokens=300)) as url:
        with ThreadPoolExecutor(8) as pool:
            tokens = sum(pool.map(converse, range(8)))
        metrics = httpx.get(f"{url}/metrics").text
    assert f"tropd_scored_tokens_total {float(tokens)}" in metrics


def test_what_is_queued_is_answered_before_the_service_ends(table_engine: Any) -> None:
    sequences = [[8, 9], [2, 3, 4], [5, 6, 7, 8]]

    def post(tokens: list[int]) -> httpx.Response:
        body = encode_request(ask(item(tokens)))
        return httpx.post(f"{url}/v1/score", content=body, headers=HEADERS, timeout=20)

    with ThreadPoolExecutor(3) as pool:
        with serving(table_engine, ServiceConfig(batch_tokens=1)) as url:
            table_engine.gate.clear()
            answers = [pool.submit(post, tokens) for tokens in sequences]
            eventually(lambda: waiting_tokens(url) >= 9, 20, "all three requests wait")
            threading.Timer(0.3, table_engine.gate.set).start()
        # The service has been told to end while all three waited, and has ended.
        for tokens, answer in zip(sequences, answers, strict=True):
            got = decode_response(answer.result().content, ask(item(tokens)))
            assert np.array_equal(got.items[0].teacher_logprobs, table_engine.expected(tokens, 1))
        with pytest.raises(httpx.ConnectError):
            post([2, 3])


@pytest.mark.parametrize("culprit", [22, 23])
def test_batch_mates_of_a_culprit_get_their_answers(table_engine: Any, culprit: int) -> None:
    sequences = [[2, 3, 4], [2, culprit, 4], [5, 6, 7]]
    with serving(table_engine) as url, ThreadPoolExecutor(4) as pool:

        def post(tokens: list[int]) -> httpx.Response:
            body = encode_request(ask(item(tokens)))
            return httpx.post(f"{url}/v1/score", content=body, headers=HEADERS, timeout=20)

        table_engine.entered.clear()
        table_engine.gate.clear()
        first = pool.submit(post, [8, 9])
        assert table_engine.entered.wait(10)
        answers = [pool.submit(post, tokens) for tokens in sequences]
        eventually(lambda: waiting_tokens(url) >= 2 + 9, 20, "the other requests wait")
        table_engine.gate.set()
        assert first.result().status_code == 200
        assert [answer.result().status_code for answer in answers] == [200, 500, 200]
        assert "unhappy" not in answers[1].result().text  # what is inside the engine stays inside
        for i in (0, 2):
            got = decode_response(answers[i].result().content, ask(item(sequences[i])))
            assert np.array_equal(got.items[0].teacher_logprobs, table_engine.expected(sequences[i], 1))
    assert sorted(map(len, table_engine.calls[2:])) == [1, 1, 1, 1, 3]


def test_a_client_that_waits_for_a_culprit_is_told_at_once(table_engine: Any) -> None:
    with serving(table_engine) as url, TeacherClient(url) as client:
        for bad in (22, 23):
            with pytest.raises(TropdError, match="refused with 500") as caught:
                client.score(ask(item([2, bad, 4])))
            assert caught.value.hint == "see the service's log"
        assert client.retries == client.tokens_scored == client.bytes_received == 0


def test_the_token_is_compared_in_constant_time(table_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return hmac.compare_digest(given, wanted)

    monkeypatch.setattr(service_module, "hmac", SimpleNamespace(compare_digest=compare))
    with serving(table_engine, token="secret") as url:
        for given, status in (
            ("Bearer secret", 200),
            ("Bearer secre", 401),
            ("", 401),
            ("Bearer s\xe9", 401),
        ):
            answer = httpx.get(f"{url}/v1/info", headers=[(b"Authorization", given.encode("latin-1"))])
            assert answer.status_code == status
        assert [wanted for _, wanted in compared] == [b"Bearer secret"] * 4
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/metrics", 401), ("/nowhere", 401)):
            assert httpx.get(url + path).status_code == status


def test_no_token_of_a_prompt_is_scored(table_engine: Any) -> None:
    tokens = [3, 9, 4, 11, 2, 7]
    with serving(table_engine) as url, TeacherClient(url) as client:
        for start in range(1, 6):
            answer = client.score(ask(item(tokens, start)))
            assert np.array_equal(answer.items[0].teacher_logprobs, table_engine.expected(tokens, start))
        assert client.tokens_scored == 5 + 4 + 3 + 2 + 1


def test_top_k_travels_for_outliers_only_and_costs_what_it_must(table_engine: Any) -> None:
    generator = np.random.default_rng(0)
    items = [item(generator.integers(0, 22, size=60).tolist(), 10, seed=i) for i in range(40)]
    n = 40 * 50
    with serving(table_engine) as url:
        sizes = {}
        for partition, topk in ((RatioPartition(threshold=0.0), "outliers"), (NoneTrusted(), "outliers")):
            with TeacherClient(url) as client:
                client.score(ScoreRequest(items, partition, topk, 8, False, V))
            assert client.topk_tokens == (n if partition.rule == "none" else 0)
            sizes[partition.rule] = client.bytes_received / n
    assert sizes["ratio"] < 6.0  # a log-prob, a bit, and the schema
    assert sizes["none"] < 6.0 + 8 * 8 + 8  # and eight alternatives, position and tail


def test_a_port_in_use_is_named_before_the_first_score(table_engine: Any) -> None:
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        settings = ServiceConfig(port=port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            run_service(table_engine, service_info(settings), settings, token=None, on_ready=print)
    assert not table_engine.calls


def test_a_service_whose_engine_fails_the_self_test_ends(table_engine: Any) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    table_engine.score = fail
    settings = ServiceConfig()
    ready: list[str] = []
    with pytest.raises(TropdError, match="did not start"):
        run_service(table_engine, service_info(settings), settings, token=None, on_ready=ready.append)
    assert not ready
