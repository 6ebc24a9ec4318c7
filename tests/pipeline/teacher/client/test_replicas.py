"""Several servers behind one client: who is asked, who takes over, who may come back, and who is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tenacity
from running import running
from scripted import INFO, ScriptedService, request
from waiting import eventually

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.run.interrupt import StopRequest, StopRequestedError
from tropd.pipeline.teacher.client import replicas
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import create_app
from tropd.storage.errors import ConfigError, TropdError

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(services: dict[str, Handler], timeout_seconds: float = 20, **options: Any) -> TeacherClient:
    """A client of several hosts."""
    urls = [f"http://{host}" for host in services]
    transport = httpx.MockTransport(lambda sent: services[sent.url.host](sent))
    return TeacherClient(urls, timeout_seconds=timeout_seconds, transport=transport, **options)


class Failing(ScriptedService):
    """Sound, but for the failures that it is told to have; ``None`` among them is a sound answer."""

    def __init__(self, *failures: httpx.Response | Exception | None, forever: bool = False) -> None:
        super().__init__()
        self.failures = list(failures)
        self.forever = forever
        self.asked = 0

    def __call__(self, sent: httpx.Request) -> httpx.Response:
        if sent.url.path != "/v1/score" and not isinstance(
            self.failures[0] if self.failures else None, Exception
        ):
            return super().__call__(sent)
        self.asked += 1
        failure = (self.failures[0] if self.forever else self.failures.pop(0)) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        return failure or super().__call__(sent)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", taken.append)
    return taken


def test_a_step_is_shared_between_the_servers_and_comes_back_in_order() -> None:
    one, two = ScriptedService(), ScriptedService()
    both = threading.Barrier(2)  # passed only if both are asked at the same time
    one.before_score = two.before_score = lambda sent: both.wait(20) and None
    lengths = [5, 9, 3, 7, 4, 8, 6, 10]
    with client_of({"one": one, "two": two}) as client:
        answer = client.score(request(*lengths))
        assert [len(item.teacher_logprobs) for item in answer.items] == [n - 1 for n in lengths]
        assert client.requests == len(one.bodies) + len(two.bodies) == 2
        assert client.bytes_sent == sum(one.bodies) + sum(two.bodies)
        assert client.replicas[0].requests == len(one.bodies) + 1  # the first info
        assert all(replica.outstanding == 0 for replica in client.replicas)


def test_the_one_with_the_fewest_outstanding_tokens_is_asked() -> None:
    entered, gate = threading.Event(), threading.Event()
    one, two = ScriptedService(), ScriptedService()

    def hold(sent: httpx.Request) -> None:
        if not entered.is_set():
            entered.set()
            assert gate.wait(20)

    one.before_score = hold
    with client_of({"one": one, "two": two}) as client:
        client.info()
        slow = threading.Thread(target=client.score, args=(request(20),))
        slow.start()
        assert entered.wait(20)
        for _ in range(3):
            client.score(request(4))
        assert (len(one.bodies), len(two.bodies)) == (0, 3)
        gate.set()
        slow.join()
        assert (len(one.bodies), len(two.bodies)) == (1, 3)


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("nothing came"),
        httpx.ReadError("reset"),
        httpx.Response(500, json={"error": "scoring failed: OutOfMemoryError"}),
        httpx.Response(503, json={"error": "the service is stopping"}),
        httpx.Response(429, json={"error": "full"}, headers={"Retry-After": "30"}),
    ],
    ids=["connect", "timeout", "reset", "500", "503", "429"],
)
def test_another_takes_over_at_once_and_it_is_said_once(
    failure: httpx.Response | Exception, no_sleep: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas.random, "uniform", lambda low, high: 0.0)  # it is tried again every time
    bad, good = Failing(failure, forever=True), ScriptedService()
    said: list[str] = []
    with client_of({"bad": bad, "good": good}, on_wait=said.append) as client:
        for _ in range(5):
            answer = client.score(request(6, 5, 4))
            assert [len(item.teacher_logprobs) for item in answer.items] == [5, 4, 3]
        first, second = client.replicas
        assert second.retries == 0
        assert first.retries == client.retries >= 1
        assert first.failures >= 1
        assert second.failures == 0
    assert sum("http://bad does not answer" in line for line in said) == 1
    assert "asking the others" in said[0]
    assert all(pause < 10 for pause in no_sleep)  # nobody waited for the one that asked for 30 s


def test_one_that_comes_back_is_used_again_and_that_is_said() -> None:
    flaky, steady = Failing(httpx.ConnectError("down")), ScriptedService()
    said: list[str] = []
    with client_of({"flaky": flaky, "steady": steady}, on_wait=said.append) as client:
        client.info()
        before = len(flaky.bodies)

        def is_used_again() -> bool:
            client.score(request(4, 5, 6, 7))
            return len(flaky.bodies) > before

        eventually(is_used_again, 20, "a request goes to the server that failed")
    assert said[0].startswith("the teacher at http://flaky does not answer")
    assert said[-1] == "the teacher at http://flaky answers again"


def test_another_teacher_that_comes_back_is_refused() -> None:
    flaky, steady = Failing(), ScriptedService()
    with client_of({"flaky": flaky, "steady": steady}) as client:
        client.score(request(4, 5))
        flaky.failures = [httpx.ConnectError("down")]
        flaky.info = INFO.model_copy(update={"weights": "b" * 64, "model": "second"})
        with pytest.raises(
            TropdError, match=r"another teacher came back at http://flaky: second with weights bbb"
        ):
            score_often(client)


def score_often(client: TeacherClient) -> None:
    for _ in range(1000):
        client.score(request(4, 5, 6, 7))


@pytest.mark.parametrize("changed", [{"weights": "b" * 64, "model": "second"}, {"tokenizer": "u" * 64}])
def test_servers_of_different_teachers_are_refused_at_the_start(changed: dict[str, str]) -> None:
    other = ScriptedService(INFO.model_copy(update=changed))
    with client_of({"one": ScriptedService(), "two": other}) as client:
        with pytest.raises(ConfigError, match=r"different teachers: http://one has first .*http://two has"):
            client.info()


def test_one_that_is_away_at_the_start_does_not_hold_up_the_others() -> None:
    said: list[str] = []
    away = Failing(httpx.ConnectError("not started"), httpx.ConnectError("not started"))
    with client_of({"away": away, "here": ScriptedService()}, on_wait=said.append) as client:
        assert client.info().model == "first"
        assert client.replicas[0].before is None
        assert len(client.score(request(4, 5)).items) == 2

        def is_asked() -> bool:
            client.score(request(4, 5, 6))
            return bool(away.bodies)

        eventually(is_asked, 20, "a request goes to the server that was away")
    assert "http://away does not answer" in said[0]


def test_all_failing_at_a_request_is_an_error_at_once(no_sleep: list[float]) -> None:
    fault = httpx.Response(500, json={"error": "scoring failed: KeyError"})
    with client_of({"one": Failing(fault, forever=True), "two": Failing(fault, forever=True)}) as client:
        with pytest.raises(TropdError, match="refused with 500: scoring failed: KeyError"):
            client.score(request(4))
    assert client.retries == 1


def test_nobody_there_is_an_error_in_time_that_names_all() -> None:
    dead = httpx.ConnectError("refused")
    services = {"one": Failing(dead, forever=True), "two": Failing(dead, forever=True)}
    with client_of(services, timeout_seconds=0.5) as client:
        with pytest.raises(TropdError, match=r"http://(one|two), http://(one|two) gave no answer for \d s"):
            client.info()


def test_the_lowest_limits_hold_for_all() -> None:
    small = ScriptedService(INFO.model_copy(update={"max_request_tokens": 12, "max_length": 500}))
    big = ScriptedService()
    with client_of({"big": big, "small": small}) as client:
        assert (client.info().max_request_tokens, client.info().max_length) == (12, 500)
        with pytest.raises(ConfigError, match="sequence 0 has 13 tokens"):
            client.score(request(13))
        assert len(client.score(request(12, 12, 12)).items) == 3
    assert len(big.bodies) + len(small.bodies) == 3


def test_a_refusal_is_not_asked_of_the_others(no_sleep: list[float]) -> None:
    refused = httpx.Response(422, json={"error": "sequence 0: a token id is outside 0 … 23"})
    one, two = Failing(refused, forever=True), Failing(refused, forever=True)
    with client_of({"one": one, "two": two}) as client, pytest.raises(TropdError, match="422: sequence 0"):
        client.score(request(4))
    assert one.asked + two.asked == 1


def test_the_wait_for_a_teacher_ends_when_the_trainer_is_asked_to_stop() -> None:
    stop = StopRequest()
    dead = httpx.ConnectError("refused")
    with client_of({"one": Failing(dead, forever=True)}, timeout_seconds=600, sleep=stop.sleep) as client:
        threading.Timer(0.3, lambda: setattr(stop, "signal", 2)).start()
        started = time.monotonic()
        with pytest.raises(StopRequestedError):
            client.info()
        assert time.monotonic() - started < 5


def test_real_servers_that_die_and_return_lose_and_mix_up_nothing(table_engine: Any) -> None:
    def app() -> Any:
        settings = ServiceConfig()
        return create_app(table_engine, INFO, settings, None)

    generator = np.random.default_rng(0)

    def check(client: TeacherClient) -> bool:
        asked = request(*generator.integers(3, 30, 8).tolist(), vocabulary=22)
        for row, got in zip(asked.sequences, client.score(asked).items, strict=True):
            assert np.array_equal(got.teacher_logprobs, table_engine.expected(row.tokens.tolist(), row.start))
        return True

    with running(app()) as one:
        with running(app()) as two:
            port = httpx.URL(two).port
            with TeacherClient([one, two], timeout_seconds=30) as client:
                # Which of two idle servers answers first, and so takes the next request, is theirs to decide.
                second_asked = lambda: check(client) and client.replicas[1].requests >= 3  # noqa: E731
                eventually(second_asked, 20, "the second server has answered three requests")
                second = two
        # The second is gone now; its client goes on with the first, and meets the second again when it is back.
        with TeacherClient([one, second], timeout_seconds=30) as client:
            check(client)
            assert client.replicas[0].retries == 0
            with running(app(), port=port or 0):
                asked_again = lambda: check(client) and client.replicas[1].requests  # noqa: E731
                eventually(asked_again, 20, "the second server has answered again")


def test_a_teacher_that_is_replaced_and_gone_before_it_can_be_asked_is_an_outage(
    no_sleep: list[float],
) -> None:
    one, two = Failing(), ScriptedService()
    with client_of({"one": one, "two": two}) as client:
        client.score(request(4, 5))
        one.info = INFO.model_copy(update={"weights": "b" * 64})

        def vanish(sent: httpx.Request) -> None:
            one.failures, one.forever = [httpx.ConnectError("gone")], True

        one.before_score = vanish
        for _ in range(20):
            assert len(client.score(request(4, 5, 6, 7)).items) == 4
        assert client.replicas[0].failures > 0
