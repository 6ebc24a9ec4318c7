"""A service that comes back after an outage must be the one that was there before."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import tenacity

from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import ServiceInfo
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest
from tropd.storage.errors import TropdError

FIRST = ServiceInfo(
    model="first",
    weights="a" * 64,
    tokenizer="t" * 64,
    tokenizer_size=24,
    vocab_size=24,
    max_length=64,
    max_request_tokens=1000,
    max_request_bytes=100_000,
    queue_tokens=1000,
)
ITEM = ScoreItem(
    tokens=np.array([2, 3, 4], dtype=np.int32),
    start=1,
    student_logprobs=np.array([-1.0, -1.0], dtype=np.float32),
    seed=0,
)
REQUEST = ScoreRequest([ITEM], AllTrusted(), "none", 0, False, 24)


def client_of(after: ServiceInfo) -> TeacherClient:
    """A client whose service refuses one connection, then answers as ``after`` with a body that makes no sense."""
    down = iter([True])
    restarted: list[bool] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/info":
            return httpx.Response(200, text=(after if restarted else FIRST).model_dump_json())
        if next(down, False):
            restarted.append(True)
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=b"nonsense")

    return TeacherClient("http://teacher", timeout_seconds=5, transport=httpx.MockTransport(handle))


def test_another_teacher_that_comes_back_is_refused() -> None:
    for changed in ({"weights": "b" * 64, "model": "second"}, {"tokenizer": "u" * 64}):
        with client_of(FIRST.model_copy(update=changed)) as client:
            with pytest.raises(TropdError, match="another teacher came back at http://teacher"):
                client.score(REQUEST)


def test_the_same_teacher_with_other_limits_is_welcome() -> None:
    with client_of(FIRST.model_copy(update={"queue_tokens": 5})) as client:
        with pytest.raises(TropdError, match="unusable answer"):  # its body is read, so it was accepted
            client.score(REQUEST)


def test_no_wait_is_longer_than_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", pauses.append)
    said: list[str] = []
    client = TeacherClient("http://127.0.0.1:9", timeout_seconds=0.3, on_wait=said.append)
    with client, pytest.raises(TropdError, match=r"gave no answer for \d+ s"):
        client.info()
    assert len(pauses) > 3
    assert 0 <= min(pauses) <= max(pauses) <= 0.3
    assert len(said) == 1
