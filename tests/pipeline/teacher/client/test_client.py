"""The client against a scripted service: whose scores these are, what fits into a request, time, and accounts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tenacity
from scripted import INFO, ScriptedService, V, request

from tropd.pipeline.teacher.client import client as client_module
from tropd.pipeline.teacher.client import dialects, http, replicas
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import ServiceInfo
from tropd.pipeline.teacher.wire.headers import QUEUE_HEADER
from tropd.pipeline.teacher.wire.messages import ScoredItem
from tropd.storage.errors import ConfigError, TropdError


def client_of(service: ScriptedService, timeout_seconds: float = 5) -> TeacherClient:
    transport = httpx.MockTransport(service)
    return TeacherClient("http://teacher", timeout_seconds=timeout_seconds, transport=transport)


def test_a_teacher_that_is_replaced_between_two_requests_is_refused() -> None:
    service = ScriptedService()
    with client_of(service) as client:
        client.score(request(4))
        service.info = replace_info(weights="b" * 64, model="second")
        with pytest.raises(TropdError, match=r"another teacher came back.*second with weights bbbbbbbbbbbb"):
            client.score(request(4))
        assert client.retries == 0  # no request had failed
        assert client.tokens_scored == 3  # and the other teacher's answer counts for nothing


def test_scores_of_nobody_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    service = ScriptedService()
    with client_of(service) as client:
        client.info()
        honest = dialects.decode_response
        monkeypatch.setattr(dialects, "decode_response", lambda *a: replace(honest(*a), teacher="c" * 64))
        with pytest.raises(TropdError, match="scores of weights cccccccccccc"):
            client.score(request(4))


def replace_info(**changes: object) -> ServiceInfo:
    return INFO.model_copy(update=changes)


@pytest.mark.parametrize(("asked", "vocab", "k"), [(3, V, 2), (5, 4, 3), (3, V, 4)])
def test_too_few_or_too_many_alternatives_are_refused(asked: int, vocab: int, k: int) -> None:
    with client_of(ScriptedService(replace_info(vocab_size=vocab), k=k)) as client:
        with pytest.raises(TropdError, match=rf"gave {k} alternatives per token, not {min(asked, vocab)}"):
            client.score(request(6, k=asked))


@pytest.mark.parametrize("limit", [2200, 2500, 4000, 9000])
def test_no_request_is_above_the_limit_of_bytes(limit: int) -> None:
    service = ScriptedService(replace_info(max_request_bytes=limit))
    lengths = [2] * 160 + [9, 3, 14] * 6  # short rows: most of a request is not tokens
    with client_of(service) as client:
        answer = client.score(request(*lengths))
    assert [len(i.teacher_logprobs) for i in answer.items] == [n - 1 for n in lengths]
    assert len(service.bodies) > 1
    assert max(service.bodies) <= limit
    # No more requests than the bound of 32 bytes a row and 2,048 a request asks for.
    room = limit - 2048 - max(4 * (2 * n - 1) + 32 for n in lengths)
    assert len(service.bodies) <= 1 + sum(4 * (2 * n - 1) + 32 for n in lengths) // max(room, 44)


def test_a_sequence_that_fits_into_no_request_is_named() -> None:
    with client_of(ScriptedService(replace_info(max_request_bytes=2500))) as client:
        with pytest.raises(ConfigError, match=r"sequence 1 has 90 tokens.*10000 tokens and 2500 bytes"):
            client.score(request(4, 90))


def test_accounts_agree_with_what_went_over_the_wire() -> None:
    service = ScriptedService(replace_info(max_request_tokens=12))
    with client_of(service) as client:
        client.score(request(5, 7, 9))
        client.score(request(3))
        assert client.score(request()).items == []
    assert client.requests == len(service.bodies) == 3
    assert client.bytes_sent == sum(service.bodies)
    assert client.bytes_received == sum(service.answers)
    assert client.tokens_scored == client.topk_tokens == 4 + 6 + 8 + 2
    assert client.retries == 0
    assert client.seconds > 0


def test_all_attempts_share_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in (client_module, http, replicas):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    service = ScriptedService()
    allowed: list[float] = []

    def slow(sent: httpx.Request) -> None:
        allowed.append(sent.extensions["timeout"]["write"])  # reading is watched, see ask_in_turn
        now[0] += 33.0
        if len(allowed) < 4:
            raise httpx.ReadTimeout("nothing came")

    service.before_score = slow
    with client_of(service, timeout_seconds=100) as client:
        client.score(request(4))
    assert allowed == [100.0, 67.0, 34.0, 1.0]
    assert client.seconds == 132.0


class Altered(ScriptedService):
    """A service whose answers differ in one field from sound ones."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.changes = changes

    def answer(self, n: int) -> ScoredItem:
        return replace(super().answer(n), **self.changes)


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_logprobs": f32(-2, -2)}, "sequence 0: the answer does not have 3 tokens"),
        ({"teacher_logprobs": f32(-2, -2, -2, -2)}, "sequence 0: the answer does not have 3 tokens"),
        ({"teacher_logprobs": f32(-2, np.nan, -2)}, "NaN or positive"),
        ({"teacher_logprobs": f32(-2, 0.5, -2)}, "NaN or positive"),
        ({"tail": f32(-1, np.nan, -1)}, "NaN or positive"),
        ({"topk_logprobs": np.full((3, 3), np.nan, dtype=np.float32)}, "NaN or positive"),
        ({"topk_ids": np.full((3, 3), V, dtype=np.int32)}, "outside 0 … 23"),
        ({"trusted": np.array([False, True, False])}, "partitioned sequence 0 differently"),
        (
            {
                "topk_positions": np.array([0, 2], dtype=np.int32),
                "topk_ids": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
                "topk_logprobs": np.full((2, 3), -2, dtype=np.float32),
                "tail": f32(-1, -1),
            },
            "alternatives for tokens other than those asked for",
        ),
    ],
    ids=range(9),
)
def test_made_up_scores_are_refused_and_count_for_nothing(changes: dict[str, object], words: str) -> None:
    with client_of(Altered(**changes)) as client:
        with pytest.raises(TropdError, match=words):
            client.score(request(4))
        assert client.tokens_scored == client.topk_tokens == client.bytes_received == client.requests == 0
        assert client.retries == 0  # it would answer the same again


def answering(*responses: httpx.Response | Exception) -> Callable[[httpx.Request], httpx.Response]:
    """A server that gives these answers to ``/v1/score``, then sound ones."""
    sound, rest = ScriptedService(), iter(responses)

    def handle(sent: httpx.Request) -> httpx.Response:
        answer = next(rest, None) if sent.url.path == "/v1/score" else None
        if isinstance(answer, Exception):
            raise answer
        return answer or sound(sent)

    return handle


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept."""
    taken: list[float] = []
    sleep, here = time.sleep, threading.current_thread()

    def note(seconds: float) -> None:
        if threading.current_thread() is here:
            taken.append(seconds)
        else:  # a pool of another test, which looks after its processes
            sleep(seconds)

    monkeypatch.setattr(tenacity.nap.time, "sleep", note)
    return taken


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("nothing came"),
        httpx.RemoteProtocolError("cut short"),
        httpx.ReadError("reset"),
        *(httpx.Response(status, json={"error": "busy"}) for status in (408, 429, 502, 503, 504)),
        *(httpx.Response(429, headers={"Retry-After": after}) for after in ("nan", "-5", "soon", "")),
    ],
    ids=range(13),
)
def test_what_may_pass_is_retried_and_announced_once(
    failure: httpx.Response | Exception, pauses: list[float]
) -> None:
    said: list[str] = []
    transport = httpx.MockTransport(answering(failure, failure, failure))
    client = TeacherClient("http://teacher", timeout_seconds=60, on_wait=said.append, transport=transport)
    with client:
        answer = client.score(request(4, 5))
    assert [len(i.teacher_logprobs) for i in answer.items] == [3, 4]
    assert client.retries == len(pauses) == 3
    assert all(0 <= pause <= 10 for pause in pauses)
    assert len(said) == 1
    assert "nothing is lost" in said[0]
    assert client.requests == 1  # what was not answered is not counted


def test_the_wait_that_the_service_asks_for_is_kept(pauses: list[float]) -> None:
    busy = [httpx.Response(429, headers={"Retry-After": after}) for after in ("17", "inf")]
    transport = httpx.MockTransport(answering(*busy))
    client = TeacherClient("http://teacher", timeout_seconds=60, transport=transport)
    with client:
        client.score(request(4))
    assert pauses[0] == 17.0
    assert 59 < pauses[1] <= 60  # but not beyond the time that is left


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(500, json={"error": "scoring failed: KeyError"}), "500: scoring failed: KeyError"),
        (httpx.Response(422, json={"error": "sequence 0: bad", "sequence": 0}), "422: sequence 0: bad"),
        (httpx.Response(404, text="<h1>nothing here</h1>"), "404: <h1>nothing here"),
        (httpx.Response(401), "401: Unauthorized"),
        (httpx.Response(302, headers={"Location": "http://elsewhere"}), "refused with 302"),
        (httpx.Response(400, json=["a"]), "400"),
        (httpx.Response(200, text="<h1>welcome</h1>"), "unusable answer"),
        (httpx.Response(200, content=b""), "unusable answer"),
        (
            httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"no")),
            "unusable",
        ),
    ],
    ids=range(9),
)
def test_what_would_not_pass_is_an_error_at_once(
    answer: httpx.Response, words: str, pauses: list[float]
) -> None:
    transport = httpx.MockTransport(answering(answer))
    client = TeacherClient("http://teacher", timeout_seconds=60, transport=transport)
    with client, pytest.raises(TropdError, match=words):
        client.score(request(4))
    assert not pauses
    assert client.retries == 0


@pytest.mark.parametrize("body", ["", "{}", "[]", "<html>", '{"protocol": 1}'])
def test_something_else_at_the_address_is_not_a_teacher(body: str) -> None:
    transport = httpx.MockTransport(lambda sent: httpx.Response(200, text=body))
    client = TeacherClient("http://teacher", transport=transport)
    with client, pytest.raises(TropdError, match="neither a tropd teacher service"):
        client.info()


def test_another_tokenizer_and_a_short_context_are_refused_with_both_values() -> None:
    with client_of(ScriptedService()) as client:
        client.check_compatible("t" * 64, V, 1000)
        with pytest.raises(ConfigError, match=r"24 tokens, hash tttttttttttt… against 30, uuuuuuuuuuuu…"):
            client.check_compatible("u" * 64, 30, 1000)
        with pytest.raises(ConfigError, match=r"takes 1000 tokens.* need 1001"):
            client.check_compatible("t" * 64, V, 1001)


@pytest.mark.parametrize("url", ["teacher:80", "ftp://teacher", "http://[::1", "/path", ""])
def test_an_address_that_can_never_work_is_not_waited_for(url: str, pauses: list[float]) -> None:
    with pytest.raises(ConfigError, match="teacher's address"):
        with TeacherClient(url, timeout_seconds=60) as client:
            client.info()
    assert not pauses


@pytest.mark.parametrize("token", ["a\nb", "tök", "\x00"])
def test_a_token_that_cannot_be_sent_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ConfigError, match="no HTTP header takes") as caught:
        TeacherClient("http://teacher", token=token)
    assert token not in str(caught.value)


def test_a_sequence_above_the_limit_of_tokens_sends_nothing() -> None:
    service = ScriptedService(replace_info(max_request_tokens=8))
    with client_of(service) as client:
        with pytest.raises(ConfigError, match="sequence 2 has 9 tokens") as caught:
            client.score(request(4, 8, 9))
        assert "service.max_request_tokens" in str(caught.value.hint)
        assert not service.bodies
        assert [len(i.teacher_logprobs) for i in client.score(request(8, 4, 4, 8)).items] == [7, 3, 3, 7]
        assert len(service.bodies) == 3


@pytest.mark.parametrize(
    ("told", "seconds"), [("1500", 1.5), (None, 0.0), ("soon", 0.0), ("nan", 0.0), ("inf", 0.0)]
)
def test_time_in_the_queue_is_counted_as_far_as_the_service_tells_it(
    told: str | None, seconds: float
) -> None:
    scripted = ScriptedService()

    def service(asked: httpx.Request) -> httpx.Response:
        response = scripted(asked)
        if told is not None:
            response.headers[QUEUE_HEADER] = told
        return response

    with TeacherClient("http://teacher", transport=httpx.MockTransport(service)) as client:
        client.score(request(4))
        assert client.queue_seconds == seconds
