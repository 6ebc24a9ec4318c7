"""The service as a process of its own: it drains on SIGTERM, and ends with the process that started it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from waiting import eventually

from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    ScoreItem,
    ScoreRequest,
    decode_response,
    encode_request,
)

# An engine that holds sequences of 11 to 30 tokens until the process gets SIGUSR1 (the self-test is longer).
SERVICE = """
import json, signal, sys, threading
import numpy as np
from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import SequenceScores
from tropd.pipeline.teacher.service.running import run_service
from tropd.pipeline.teacher.wire.info import ServiceInfo

class Engine:
    vocab_size, max_length = 24, 64
    def score(self, sequences, starts, **options):
        if 10 < max(map(len, sequences)) <= 30:
            released.wait()
        ids, logprobs = np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
        return [
            SequenceScores(np.full(len(s) - b, -1, np.float32), None, np.zeros(0, np.int64), ids, logprobs)
            for s, b in zip(sequences, starts)
        ]

released = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: released.set())
info = ServiceInfo(model="toy", weights="w", tokenizer="t", tokenizer_size=24, vocab_size=24, max_length=64,
                   max_request_tokens=99, max_request_bytes=9999, queue_tokens=99)
run_service(Engine(), info, ServiceConfig(**json.loads(sys.argv[1])), token=None, exit_with_parent=True,
            on_ready=lambda url: print(json.dumps({"url": url}), flush=True))
"""


@contextmanager
def service(**settings: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert httpx.get(f"{url}/readyz").status_code == 200
        yield process, url
    finally:
        process.kill()
        process.wait()


def is_waiting(url: str) -> bool:
    """Whether a request has come and has no answer yet."""
    return "tropd_waiting_tokens 0.0" not in httpx.get(f"{url}/metrics").text


def test_a_request_in_flight_is_answered_before_the_service_ends() -> None:
    item = ScoreItem(np.full(20, 2, dtype=np.int32), 1, np.full(19, -1.0, dtype=np.float32), 0)
    request = ScoreRequest([item], AllTrusted(), "none", 0, False, 24)
    answers: list[httpx.Response] = []

    def post(url: str) -> None:
        headers = {"Content-Type": CONTENT_TYPE}
        answers.append(
            httpx.post(f"{url}/v1/score", content=encode_request(request), headers=headers, timeout=30)
        )

    with service() as (process, url):
        thread = threading.Thread(target=post, args=(url,))
        thread.start()
        eventually(lambda: is_waiting(url), 20, "the request waits")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGUSR1)
        thread.join()
        process.wait(30)
    assert answers[0].status_code == 200
    assert np.all(decode_response(answers[0].content, request).items[0].teacher_logprobs == -1)


def test_sigterm_ends_the_service_in_seconds_whatever_clients_do() -> None:
    item = ScoreItem(np.full(20, 2, dtype=np.int32), 1, np.full(19, -1.0, dtype=np.float32), 0)
    body = encode_request(ScoreRequest([item], AllTrusted(), "none", 0, False, 24))
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    with service(stop_seconds=0.5) as (process, url), contextlib.ExitStack() as stack:

        def client(content: bytes) -> socket.socket:
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0))
            )
            connection.settimeout(20)
            connection.sendall(content)
            return connection

        client(b"")
        client(b"GET /v1/info HTTP/1.1\r\nHo")
        alive = client(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert alive.recv(4096).startswith(b"HTTP/1.1 200")
        half = client(head.encode() + body[:20])
        stuck = client(head.encode() + body)  # the engine never comes back
        eventually(lambda: is_waiting(url), 20, "the request waits")
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert half.recv(4096).startswith(b"HTTP/1.1 503")  # at once
        assert time.monotonic() - started < 5
        assert stuck.recv(4096).startswith(b"HTTP/1.1 503")
        process.wait(15)


def test_the_service_ends_when_its_standard_input_does() -> None:
    with service() as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
