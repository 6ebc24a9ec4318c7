"""A teacher in this process, where training would have a client of its service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model
from tropd.pipeline.teacher.service.batcher import score_requests
from tropd.pipeline.teacher.wire.messages import ScoreRequest, ScoreResponse
from tropd.pipeline.training import setup


class TeacherHere:
    """It keeps what it is asked, and counts what it answers, as a client does."""

    url = "http://teacher"
    replicas: tuple[Any, ...] = ()
    tokens_scored = topk_tokens = bytes_sent = bytes_received = retries = 0
    queue_seconds = 0.0

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.requests: list[ScoreRequest] = []

    def score(self, request: ScoreRequest) -> ScoreResponse:
        self.requests.append(request)
        answer = score_requests(self.engine, [request])[0]
        self.tokens_scored += sum(len(item.teacher_logprobs) for item in answer.items)
        return answer


def teacher_of(folder: Path) -> TeacherHere:
    """The one with the model in a folder, in float32."""
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))
    return TeacherHere(TransformersEngine(model, [1]))


def asked_here(monkeypatch: pytest.MonkeyPatch, connect: Any) -> None:
    """Training asks the teachers that ``connect`` gives, with the arguments of ``connect_teachers``."""
    monkeypatch.setattr(setup, "start_teachers", lambda *_, **__: {})
    monkeypatch.setattr(setup, "connect_teachers", connect)
