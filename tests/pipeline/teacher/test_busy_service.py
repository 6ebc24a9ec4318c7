"""A service that several clients share is busy for longer than their time limit: nobody gives up, all get their turn."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from running import running, service_info
from scripted import request

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.teacher.client import http
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.wire.messages import ScoreResponse
from tropd.storage.errors import TropdError

WORK_SECONDS = 0.4
LIMIT_SECONDS = 1.0


@pytest.fixture
def slow(table_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine that takes its time once ``busy`` is set."""
    plain, busy = table_engine.score, threading.Event()

    def score(*arguments: Any, **options: Any) -> Any:
        if busy.is_set():
            time.sleep(WORK_SECONDS)
        return plain(*arguments, **options)

    monkeypatch.setattr(table_engine, "score", score)
    table_engine.busy = busy
    monkeypatch.setattr(http, "LOOK_SECONDS", 0.1)
    return table_engine


def test_time_in_the_queue_does_not_count_and_turns_are_fair(slow: Any) -> None:
    asked = request(6, k=3)
    settings = ServiceConfig(batch_tokens=1, queue_tokens=10)  # full with two waiting requests
    order: list[int] = []

    def train(number: int, url: str) -> list[ScoreResponse]:
        answers = []
        with TeacherClient(url, timeout_seconds=LIMIT_SECONDS) as client:
            for _ in range(2):
                answers.append(client.score(asked))
                order.append(number)
            assert client.retries == 0
        return answers

    with running(create_app(slow, service_info(settings), settings, None)) as url:
        slow.busy.set()
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda number: train(number, url), range(5)))
    assert len(set(order[:5])) == 5  # each has its turn before anybody's second
    first = found[0][0].items[0].teacher_logprobs
    for answer in (answer for answers in found for answer in answers):
        np.testing.assert_array_equal(answer.items[0].teacher_logprobs, first)


def test_work_that_takes_longer_than_the_limit_is_given_up(slow: Any) -> None:
    settings = ServiceConfig()
    with running(create_app(slow, service_info(settings), settings, None)) as url:
        slow.busy.set()
        with TeacherClient(url, timeout_seconds=WORK_SECONDS / 2) as client:
            with pytest.raises(TropdError, match="no longer waited for its turn"):
                client.score(request(6, k=3))
