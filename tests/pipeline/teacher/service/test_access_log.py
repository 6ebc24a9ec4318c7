"""The access log: a line per request, whatever became of it; and the self-test that makes a service ready."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import running
from scripted import INFO, request

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.base import SequenceScores
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.access_log import Access, open_access_log
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.batcher import TeacherOutputError
from tropd.pipeline.teacher.service.self_test import self_test
from tropd.pipeline.teacher.wire.messages import CONTENT_TYPE, encode_request


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_leaves_a_line_that_says_what_became_of_it(table_engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "access.jsonl"
    app = create_app(
        table_engine, INFO, ServiceConfig(max_request_bytes=5000), "secret", open_access_log(path)
    )
    asked = request(6, 9, vocabulary=22)
    with running(app) as url:
        with TeacherClient(url, token="secret") as client:
            client.score(asked)
        headers = {"Content-Type": CONTENT_TYPE, "Authorization": "Bearer secret"}
        for probe in ("/healthz", "/readyz"):
            assert httpx.get(url + probe).status_code == 200
        for content, status in (
            (b"nonsense", 422),
            (bytes(6000), 413),
            (encode_request(request(4, 99)), 422),
        ):
            assert httpx.post(f"{url}/v1/score", content=content, headers=headers).status_code == status
        assert httpx.get(f"{url}/v1/info").status_code == 401
        failing = httpx.post(f"{url}/v1/score", content=_with_token(23), headers=headers)
        assert failing.status_code == 500
    told = lines(path)
    assert [(line["path"], line["status"]) for line in told] == [
        ("/v1/info", 200),
        ("/v1/score", 200),
        ("/v1/score", 422),
        ("/v1/score", 413),
        ("/v1/score", 422),
        ("/v1/info", 401),
        ("/v1/score", 500),
    ]
    good = told[1]
    assert (good["client"], good["method"], good["items"], good["tokens"]) == ("127.0.0.1", "POST", 2, 15)
    assert good["bytes_in"] == len(encode_request(asked))
    assert good["bytes_out"] == client.bytes_received
    assert 0 <= good["queue_ms"] <= good["total_ms"]
    assert client.queue_seconds == pytest.approx(good["queue_ms"] / 1000, abs=1e-3)
    assert 0 <= good["engine_ms"] <= good["total_ms"]
    assert "error" not in good
    assert told[2]["error"].startswith("not an Arrow stream")
    assert "queue_ms" not in told[2]
    assert "bearer token" in told[5]["error"]
    assert told[6]["engine_ms"] >= 0
    assert all(line["time"].endswith("+00:00") for line in told)
    assert "secret" not in path.read_text()


def _with_token(token: int) -> bytes:
    asked = request(4)
    asked.sequences[0].tokens[:] = token
    return encode_request(asked)


def test_a_log_that_was_moved_away_is_made_anew_and_lines_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    one, two = open_access_log(path), open_access_log(path)  # two services of a workspace
    for number in range(20):
        (one, two)[number % 2](Access("c", "POST", f"/{number}"))
    path.rename(tmp_path / "old.jsonl")
    one(Access("c", "POST", "/new"))
    assert [line["path"] for line in lines(tmp_path / "old.jsonl")] == [f"/{n}" for n in range(20)]
    assert [line["path"] for line in lines(path)] == ["/new"]


class Moody:
    """Gives the log-probs of a list, one value per call."""

    vocab_size, max_length = 24, 64

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def score(self, sequences: Any, starts: Any, **options: Any) -> list[SequenceScores]:
        value = next(self.values)
        n = len(sequences[0]) - starts[0]
        none = np.zeros((0, 0), np.float32)
        return [
            SequenceScores(
                np.full(n, value, np.float32), None, np.zeros(0, np.int64), none.astype(np.int32), none
            )
        ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((np.nan, -1.0), "NaN or positive"),
        ((0.146, -1.0), "NaN or positive"),
        ((-np.inf, -np.inf), "not finite"),
        ((-1.0, -1.2), r"different log-probs the second time \(difference 0\.2\)"),
        ((-1.0, np.nan), "NaN or positive"),
    ],
)
def test_a_teacher_must_say_the_same_possible_thing_twice(values: tuple[float, ...], words: str) -> None:
    with pytest.raises(TeacherOutputError, match=words):
        self_test(Moody(*values))  # type: ignore[arg-type]


def test_rounding_does_not_keep_a_teacher_from_being_ready() -> None:
    self_test(Moody(-1.0, -1.01))  # type: ignore[arg-type]


def test_a_service_is_not_ready_before_its_self_test(table_engine: Any) -> None:
    app = create_app(table_engine, INFO, ServiceConfig(), None)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(
            app
        )  # does not start the application, so that nothing has been scored
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as http:
            return [(await http.get(path)).status_code for path in ("/healthz", "/readyz")]

    assert asyncio.run(ask()) == [200, 503]
    app.state.batcher.close()


def test_behind_a_proxy_on_this_machine_the_log_names_the_client(table_engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    with running(create_app(table_engine, INFO, ServiceConfig(), None, open_access_log(path))) as url:
        httpx.get(f"{url}/v1/info", headers={"X-Forwarded-For": "192.0.2.7"})
    assert [line["client"] for line in lines(path)] == ["192.0.2.7"]
