"""Service and client over real HTTP on loopback: right answers, limits, batching, outages, and no made-up scores."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from waiting import eventually

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import SequenceScores
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.partition_specs import AllTrusted, SampledPartition
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import ServiceInfo, create_app
from tropd.pipeline.teacher.service.batcher import Batcher, QueueFullError, TeacherOutputError
from tropd.pipeline.teacher.service.listen import check_address, listen
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    ScoreItem,
    ScoreRequest,
    decode_response,
    encode_request,
)
from tropd.storage.errors import ConfigError, TropdError

V = 24


class FakeEngine:
    """Log-probs that depend on the token only; token 23 makes it fail, token 22 makes it answer NaN.

    ``gate`` holds it back while it is clear, ``entered`` says that it is inside ``score``.
    """

    vocab_size = V
    max_length = 64

    def __init__(self, delay: float = 0.0) -> None:
        self.calls: list[int] = []
        self.delay = delay
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], **options: Any
    ) -> list[SequenceScores]:
        self.entered.set()
        self.gate.wait(10)
        self.calls.append(len(sequences))
        results = []
        for index, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
            if 23 in tokens:
                raise RuntimeError("the engine is unhappy")
            sampled = np.array([np.nan if t == 22 else -t / 4 for t in tokens[start:]], dtype=np.float32)
            entropy = np.ones_like(sampled) if options.get("entropy") else None
            where = (
                options["topk_where"](index, sampled, entropy)
                if options["k"]
                else np.zeros(len(sampled), bool)
            )
            positions = np.flatnonzero(where)
            k = min(options["k"], V)
            ids = np.tile(np.arange(k, dtype=np.int32), (len(positions), 1))
            logprobs = np.tile(np.log(0.5 ** np.arange(1, k + 1)).astype(np.float32), (len(positions), 1))
            results.append(SequenceScores(sampled, entropy, positions, ids, logprobs))
        return results


def info(engine: Any, **changes: Any) -> ServiceInfo:
    settings = ServiceConfig()
    values = {
        "model": "toy",
        "weights": "w",
        "tokenizer": "t",
        "tokenizer_size": V,
        "vocab_size": V,
        "max_length": engine.max_length,
        "max_request_tokens": settings.max_request_tokens,
        "max_request_bytes": settings.max_request_bytes,
        "queue_tokens": settings.queue_tokens,
    }
    return ServiceInfo(**{**values, **changes})


@contextmanager
def serving(
    engine: Any,
    settings: ServiceConfig | None = None,
    *,
    token: str | None = None,
    port: int = 0,
    **changes: Any,
) -> Iterator[str]:
    """A service in a thread; yields its URL."""
    settings = settings or ServiceConfig()
    limits = {
        name: getattr(settings, name) for name in ("max_request_tokens", "max_request_bytes", "queue_tokens")
    }
    app = create_app(engine, info(engine, **{**limits, **changes}), settings, token)
    listener = listen("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    eventually(lambda: server.started and app.state.ready, 20, "the service is ready")
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def item(tokens: list[int], start: int = 1, seed: int = 5, student: float = -1.5) -> ScoreItem:
    n = len(tokens) - start
    return ScoreItem(np.array(tokens, dtype=np.int32), start, np.full(n, student, dtype=np.float32), seed)


def ask(items: list[ScoreItem], topk: Any = "outliers", k: int = 4, partition: Any = None) -> ScoreRequest:
    return ScoreRequest(items, partition or SampledPartition(), topk, k, False, V)


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", content=body, headers={"Content-Type": CONTENT_TYPE, **headers})


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    with serving(FakeEngine()) as url:
        yield url


def test_answers_equal_a_local_forward(tiny_model: Any) -> None:
    generator = np.random.default_rng(0)
    items = []
    for i in range(12):
        tokens = generator.integers(2, V, size=int(generator.integers(3, 20))).tolist()
        items.append(item(tokens, start=int(generator.integers(1, len(tokens))), seed=i, student=-2.0))
    with serving(TransformersEngine(tiny_model, [1], batch_tokens=64)) as url, TeacherClient(url) as client:
        answer = client.score(ask(items, k=5))
        assert client.tokens_scored == sum(len(i.student_logprobs) for i in items)
        assert client.topk_tokens == sum(int((~a.trusted).sum()) for a in answer.items) > 0
    for asked, got in zip(items, answer.items, strict=True):
        with torch.no_grad():
            logits = tiny_model(torch.from_numpy(asked.tokens[None].astype(np.int64))).logits[0]
        exact = torch.log_softmax(logits, -1)[asked.start - 1 : -1]
        targets = torch.from_numpy(asked.tokens[asked.start :].astype(np.int64)).unsqueeze(-1)
        assert np.allclose(got.teacher_logprobs, exact.gather(-1, targets).squeeze(-1), atol=1e-5)
        assert np.array_equal(got.topk_positions, np.flatnonzero(~got.trusted))
        values, ids = exact[got.topk_positions.tolist()].topk(5)
        assert np.allclose(got.topk_logprobs, values, atol=1e-5)
        assert np.array_equal(got.topk_ids, ids)
        assert np.allclose(np.exp(got.tail), 1 - values.exp().sum(-1), atol=1e-5)


def test_the_same_request_gets_bit_identical_answers(tiny_model: Any) -> None:
    request = ask([item([3, 4, 5, 6], seed=i) for i in range(9)])
    with serving(TransformersEngine(tiny_model, [1])) as url:
        bodies = {post(url, encode_request(request)).content for _ in range(3)}
    assert len(bodies) == 1


def test_endpoints_and_metrics(fake_url: str) -> None:
    assert httpx.get(f"{fake_url}/healthz").json() == {"status": "alive"}
    assert httpx.get(f"{fake_url}/readyz").status_code == 200
    assert httpx.get(f"{fake_url}/v1/info").json()["tokenizer"] == "t"
    with TeacherClient(fake_url) as client:
        client.score(ask([item([2, 3, 4])]))
    text = httpx.get(f"{fake_url}/metrics").text
    assert "tropd_scored_tokens_total" in text
    assert "tropd_waiting_tokens 0.0" in text


@pytest.mark.parametrize(
    ("bad", "sequence"),
    [([item([2, 3]), item([2, 99])], 1), ([item([2] * 65)], 0), ([item([2, 3], seed=-4)], 0)],
)
def test_a_bad_sequence_gets_422_with_its_number(fake_url: str, bad: list[ScoreItem], sequence: int) -> None:
    answer = post(fake_url, encode_request(ask(bad)))
    assert answer.status_code == 422
    assert answer.json()["sequence"] == sequence
    with TeacherClient(fake_url) as client, pytest.raises(TropdError, match="422"):
        client.score(ask(bad))


def test_garbage_is_refused_and_good_requests_still_work(fake_url: str) -> None:
    generator = np.random.default_rng(0)
    good = ask([item([2, 3, 4])])
    body = encode_request(good)
    with httpx.Client() as http:
        for trial in range(300):
            broken = bytearray(body) if trial % 2 else bytearray(generator.bytes(200))
            broken[int(generator.integers(len(broken)))] ^= 0xFF
            answer = http.post(
                f"{fake_url}/v1/score", content=bytes(broken), headers={"Content-Type": CONTENT_TYPE}
            )
            assert answer.status_code in (200, 422), (
                answer.text
            )  # a flipped bit in a value may still be valid
            if trial % 100 == 99:
                sound = http.post(
                    f"{fake_url}/v1/score", content=body, headers={"Content-Type": CONTENT_TYPE}
                )
                assert np.allclose(
                    decode_response(sound.content, good).items[0].teacher_logprobs, [-0.75, -1.0]
                )


def test_limits_of_size_and_type(fake_url: str) -> None:
    body = encode_request(ask([item([2, 3])]))
    assert post(fake_url, body, **{"Content-Type": "application/json"}).status_code == 415
    with serving(FakeEngine(), ServiceConfig(max_request_bytes=4096, max_request_tokens=20)) as url:
        assert post(url, bytes(5000)).status_code == 413

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield bytes(100)

        streamed = httpx.post(f"{url}/v1/score", content=chunks(), headers={"Content-Type": CONTENT_TYPE})
        assert streamed.status_code == 413
    with serving(FakeEngine(), ServiceConfig(max_request_tokens=20)) as url:
        answer = post(url, encode_request(ask([item([2] * 8) for _ in range(3)])))
        assert answer.status_code == 422
        assert "24 tokens" in answer.json()["error"]


def test_the_client_splits_at_the_limits_and_names_what_fits_nowhere() -> None:
    engine = FakeEngine()
    with serving(engine, ServiceConfig(max_request_tokens=20)) as url, TeacherClient(url) as client:
        answer = client.score(ask([item([2] * 8) for _ in range(5)]))
        assert len(answer.items) == 5
        assert engine.calls[2:] == [2, 2, 1]  # the first two calls are the self-test
        with pytest.raises(ConfigError, match="sequence 1 has 30 tokens"):
            client.score(ask([item([2] * 8), item([2] * 30)]))
        assert client.score(ask([])).items == []


def test_a_token_guards_everything_but_the_probes() -> None:
    with serving(FakeEngine(), token="secret") as url:
        assert httpx.get(f"{url}/readyz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert httpx.get(f"{url}/v1/info", headers=headers).status_code == 401
            assert post(url, b"", **headers).status_code == 401
        with TeacherClient(url, token="secret") as client:
            assert client.info().model == "toy"
            assert len(client.score(ask([item([2, 3])])).items) == 1
        with TeacherClient(url) as client, pytest.raises(TropdError, match="401"):
            client.info()


def is_waiting(url: str) -> bool:
    """Whether a request has come and has no answer yet."""
    return "tropd_waiting_tokens 0.0" not in httpx.get(f"{url}/metrics").text


def test_only_loopback_without_a_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(host, None, "VARIABLE")
    check_address("0.0.0.0", "secret", "VARIABLE")
    for host in ("0.0.0.0", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="not loopback") as caught:
            check_address(host, None, "VARIABLE")
        assert "VARIABLE" in str(caught.value.hint)


def test_a_full_queue_answers_429_but_a_client_with_nothing_in_it_has_its_turn() -> None:
    engine = FakeEngine()
    with serving(engine, ServiceConfig(queue_tokens=30, batch_tokens=1)) as url:
        engine.gate.clear()
        body = encode_request(ask([item([2] * 20)]))
        waiting = threading.Thread(target=lambda: post(url, body))
        waiting.start()
        eventually(lambda: is_waiting(url), 20, "a request waits")
        answer = post(url, body)
        assert answer.status_code == 429
        assert float(answer.headers["Retry-After"]) > 0
        threading.Timer(0.3, engine.gate.set).start()
        messages: list[str] = []
        with TeacherClient(url, timeout_seconds=20, on_wait=messages.append) as client:
            assert len(client.score(ask([item([2] * 20)])).items) == 1
            assert client.retries == 0
        assert not messages
        waiting.join()


def test_small_requests_are_merged_and_a_lone_client_is_not() -> None:
    engine = FakeEngine()
    batcher = Batcher(engine, batch_tokens=100, queue_tokens=1000)  # type: ignore[arg-type]
    for _ in range(3):
        batcher.submit(ask([item([2, 3, 4])])).result(10)
    assert engine.calls == [1, 1, 1]
    engine.entered.clear()
    engine.gate.clear()
    first = batcher.submit(ask([item([2, 3])]))
    assert engine.entered.wait(10)
    futures = [batcher.submit(ask([item([2, 3, 4 + i])])) for i in range(6)]
    other = batcher.submit(ask([item([5, 6])], partition=AllTrusted()))
    engine.gate.set()
    answers = [f.result(10) for f in [first, *futures, other]]
    assert engine.calls[3:] == [1, 6, 1]  # other options are not mixed in
    for i, answer in enumerate(answers[1:7]):
        assert answer.items[0].teacher_logprobs[-1] == np.float32(-(4 + i) / 4)
    batcher.close()


@pytest.mark.parametrize("culprit", [23, 22])
def test_one_bad_request_does_not_spoil_its_batch_mates(culprit: int) -> None:
    engine = FakeEngine()
    batcher = Batcher(engine, batch_tokens=100, queue_tokens=1000)  # type: ignore[arg-type]
    engine.entered.clear()
    engine.gate.clear()
    first = batcher.submit(ask([item([2, 3])]))
    assert engine.entered.wait(10)
    futures = [batcher.submit(ask([item([2, t])])) for t in (4, culprit, 6)]
    engine.gate.set()
    assert first.result(10)
    assert futures[0].result(10).items[0].teacher_logprobs[0] == -1.0
    assert futures[2].result(10).items[0].teacher_logprobs[0] == -1.5
    with pytest.raises(RuntimeError if culprit == 23 else TeacherOutputError):
        futures[1].result(10)
    batcher.close()
    assert batcher.waiting_tokens == 0


def test_the_queue_is_bounded_but_never_refuses_a_lone_large_request() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    batcher = Batcher(engine, batch_tokens=4, queue_tokens=10)  # type: ignore[arg-type]
    large = batcher.submit(ask([item([2] * 40)]))
    with pytest.raises(QueueFullError):
        batcher.submit(ask([item([2, 3])]))
    engine.gate.set()
    assert large.result(10)
    batcher.close()


def test_a_failing_teacher_is_a_clear_error_and_not_retried(fake_url: str) -> None:
    with TeacherClient(fake_url) as client:
        for tokens in ([2, 23], [2, 22]):
            with pytest.raises(TropdError, match="500"):
                client.score(ask([item(tokens)]))
        assert client.retries == 0
        assert len(client.score(ask([item([2, 3])])).items) == 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_service_that_comes_back_is_met_again() -> None:
    port = free_port()
    request = ask([item([2, 3, 4])])
    messages: list[str] = []
    with TeacherClient(f"http://127.0.0.1:{port}", timeout_seconds=30, on_wait=messages.append) as client:
        with serving(FakeEngine(), port=port):
            first = client.score(request)
        stop = threading.Event()

        def later() -> None:
            eventually(lambda: messages, 20, "the client has met nobody")
            with serving(FakeEngine(), port=port):
                stop.wait(30)

        thread = threading.Thread(target=later)
        thread.start()
        second = client.score(request)
        stop.set()
        thread.join()
    assert np.array_equal(first.items[0].teacher_logprobs, second.items[0].teacher_logprobs)
    assert client.retries >= 1
    assert len(messages) == 1


def test_a_dead_service_is_an_error_in_time() -> None:
    with TeacherClient(f"http://127.0.0.1:{free_port()}", timeout_seconds=1) as client:
        with pytest.raises(TropdError, match="gave no answer"):
            client.score(ask([item([2, 3])]))


def test_what_is_not_a_teacher_service_is_refused() -> None:
    with serving(FakeEngine(), protocol=9) as url, TeacherClient(url) as client:
        with pytest.raises(TropdError, match="speaks protocol 9"):
            client.info()


def test_compatibility_is_checked_with_both_values(fake_url: str) -> None:
    with TeacherClient(fake_url) as client:
        client.check_compatible("t", V, 64)
        with pytest.raises(ConfigError, match="another tokenizer"):
            client.check_compatible("other", V, 64)
        with pytest.raises(ConfigError, match=r"takes 64 tokens.*need 65"):
            client.check_compatible("t", V, 65)


def test_a_teacher_that_gives_too_little_is_refused_with_the_part_that_needs_it() -> None:
    with serving(FakeEngine(), max_topk=4) as url, TeacherClient(url) as client:
        for name, k, words in (
            (
                "tropd",
                5,
                r"'tropd' needs the teacher's top 5 \(outlier\.loss\.estimator = 'topk_fkl'\).*gives 4",
            ),
            ("vopd", 9, r"trust\.loss\.estimator = 'k1'"),
            ("tip", 9, r"token_weights: soft_or_top"),
            ("eopd", 4, r"partition\.rule = 'teacher_entropy'"),
        ):
            objective = load_objective(name, {"k": k})
            with pytest.raises(ConfigError, match=words):
                client.check_gives(teacher_needs(objective), objective)
        for name in ("opd", "tropd-clip", "sft"):
            objective = load_objective(name)
            client.check_gives(teacher_needs(objective), objective)
        fitting = load_objective("tropd", {"k": 4})
        client.check_gives(teacher_needs(fitting), fitting)
    with serving(FakeEngine(), max_topk=V) as url, TeacherClient(url) as client:
        everything = load_objective("tropd", {"k": 64})
        client.check_gives(teacher_needs(everything), everything)


def test_a_mask_that_differs_from_the_clients_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tropd.pipeline.teacher.service import batcher

    with serving(FakeEngine()) as url, TeacherClient(url) as client:
        honest = batcher.outlier_mask
        monkeypatch.setattr(batcher, "outlier_mask", lambda *a: ~honest(*a))
        with pytest.raises(TropdError, match="partitioned sequence 0 differently"):
            client.score(ask([item([2, 9, 4])]))
