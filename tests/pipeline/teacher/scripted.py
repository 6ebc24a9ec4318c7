"""A service of known answers, for clients without a network."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import numpy as np

from tropd.pipeline.objectives.partition_specs import NoneTrusted
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import (
    ScoredItem,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    decode_request,
    encode_response,
    log_tail,
)

V = 24
INFO = ServiceInfo(
    model="first",
    weights="a" * 64,
    tokenizer="t" * 64,
    tokenizer_size=V,
    vocab_size=V,
    max_length=1000,
    max_request_tokens=10_000,
    max_request_bytes=100_000,
    queue_tokens=10_000,
)


class ScriptedService:
    """Answers every request soundly: each token an outlier of log-prob -2 with ``k`` alternatives."""

    def __init__(self, info: ServiceInfo = INFO, k: int = 3) -> None:
        self.info = info
        self.k = k
        self.before_score: Callable[[httpx.Request], None] = lambda request: None
        self.bodies: list[int] = []
        self.answers: list[int] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/info":
            return httpx.Response(200, text=self.info.model_dump_json())
        self.before_score(request)
        self.bodies.append(len(request.content))
        asked = decode_request(
            request.content, vocab_size=V, max_length=1000, max_bytes=self.info.max_request_bytes
        )
        items = [self.answer(len(item.student_logprobs)) for item in asked.sequences]
        content = encode_response(ScoreResponse(items, self.info.weights), k=self.k, entropy=False)
        self.answers.append(len(content))
        return httpx.Response(200, content=content)

    def answer(self, n: int) -> ScoredItem:
        logprobs = np.tile(np.log(0.5 ** np.arange(1, self.k + 1)).astype(np.float32), (n, 1))
        return ScoredItem(
            teacher_logprobs=np.full(n, -2.0, dtype=np.float32),
            trusted=np.zeros(n, dtype=np.bool_),
            entropy=None,
            topk_positions=np.arange(n, dtype=np.int32),
            topk_ids=np.tile(np.arange(self.k, dtype=np.int32), (n, 1)),
            topk_logprobs=logprobs,
            tail=log_tail(logprobs),
        )


def request(*lengths: int, k: int = 3, vocabulary: int = V) -> ScoreRequest:
    """Random sequences of these lengths, all outliers."""
    generator = np.random.default_rng(0)
    items = [
        ScoreItem(
            tokens=generator.integers(0, vocabulary, n).astype(np.int32),
            start=1,
            student_logprobs=-generator.random(n - 1, dtype=np.float32),
            seed=int(generator.integers(2**62)),
        )
        for n in lengths
    ]
    return ScoreRequest(items, NoneTrusted(), "outliers", k, False, V)
