"""The client of the teacher: splits, asks one server or several, checks every answer, and never makes up a score."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType

import httpx
import numpy as np
import tenacity

from tropd.pipeline.objectives.needs import TeacherNeeds, needs_topk
from tropd.pipeline.objectives.objective import Objective, entropy_part
from tropd.pipeline.objectives.token_weight_specs import TOPK_WEIGHTS
from tropd.pipeline.teacher.client.dialects import Dialect
from tropd.pipeline.teacher.client.http import Exchange
from tropd.pipeline.teacher.client.replicas import Replica, Replicas
from tropd.pipeline.teacher.client.split import side_by_side, split_request
from tropd.pipeline.teacher.client.vllm_dialect import SPARE, VllmDialect
from tropd.pipeline.teacher.service.batcher import outlier_mask
from tropd.pipeline.teacher.wire.headers import ALONE_HEADER, CLIENT_HEADER
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import ScoreRequest, ScoreResponse
from tropd.storage.errors import ConfigError, TropdError


class TeacherClient:
    """Talks to one server or to several that have the same teacher. Use as a context manager.

    A step is cut into parts by the number of servers, not by which of them are up, and as many parts are under way
    at once: with one server one at a time.

    Args:
        url: of the server, or of several.
        token: bearer token, if they want one.
        timeout_seconds: how long a request is retried before ``score`` gives up; time in a server's queue does not count.
        on_wait: called once per outage, with the reason why nothing happens.
        sleep: waits between two attempts; may raise to end the wait.
        transport: carries requests; sockets if None.
        alone: have requests scored by themselves, so that answers do not depend on what else arrives (see ``batcher``).

    Raises:
        ConfigError: ``url`` is no URL, or ``token`` cannot be sent.

    Counts answered work: ``requests``, ``seconds`` of waiting for their answers (outages included),
    ``queue_seconds`` of them in the servers' queues as far as they tell,
    ``tokens_scored``, ``topk_tokens``, ``bytes_sent``, ``bytes_received``; and ``retries``.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        timeout_seconds: float = 300.0,
        on_wait: Callable[[str], None] = lambda message: None,
        sleep: Callable[[float], None] = tenacity.nap.sleep,
        transport: httpx.BaseTransport | None = None,
        alone: bool = False,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        urls = list(dict.fromkeys(one.rstrip("/") for one in urls))
        self.url = ", ".join(urls)
        self.tokens_scored = 0
        self.topk_tokens = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.requests = 0
        self.seconds = 0.0
        self.queue_seconds = 0.0
        self._lock = threading.Lock()
        if token and not (token.isascii() and token.isprintable()):
            raise ConfigError(
                "the bearer token has characters that no HTTP header takes",
                hint="use printable ASCII characters only, in the environment of service and trainer",
            )
        headers = {CLIENT_HEADER: uuid.uuid4().hex}
        headers |= {ALONE_HEADER: "1"} if alone else {}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        for one in urls:
            try:
                httpx.URL(one)
            except httpx.InvalidURL as error:
                raise ConfigError(f"the teacher's address {one!r} is not a URL: {error}") from error
        # trust_env is off: a proxy from the environment must not see requests to a loopback service.
        self._http = httpx.Client(headers=headers, trust_env=False, transport=transport)
        self._replicas = Replicas(
            urls,
            self._http,
            timeout_seconds=timeout_seconds,
            on_wait=on_wait,
            sleep=sleep,
        )

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    @property
    def replicas(self) -> Sequence[Replica]:
        """The servers, and how each has fared."""
        return self._replicas.all

    @property
    def retries(self) -> int:
        """Failed attempts that were followed by another."""
        return sum(replica.retries for replica in self.replicas)

    def info(self) -> ServiceInfo:
        """The teacher's identity (asked once), and the limits that all servers that have answered accept.

        Raises:
            TropdError: none answers, one is not a scoring server, or they have different teachers.
        """
        if not self._replicas.infos:
            if len(self.replicas) > 1:
                self._replicas.greet()
            self._replicas.call(lambda exchange, dialect: None)
        infos = self._replicas.infos
        lowest = (
            "max_length",
            "max_request_tokens",
            "max_request_bytes",
            "max_topk",
            "max_chosen",
            "entropy",
        )
        return infos[0].model_copy(update={name: min(getattr(i, name) for i in infos) for name in lowest})

    def check_compatible(
        self, tokenizer: str, tokenizer_size: int, needed_length: int, differing: Sequence[str] = ()
    ) -> None:
        """Refuse a teacher that does not fit the student. A vLLM server has no hash: see ``check_token_texts``.

        Args:
            tokenizer: hash of the student's.
            differing: parts of the tokenizers that differ, where a server names its parts.

        Raises:
            ConfigError: other tokenizer, or a context that is too short; with both values.
        """
        info = self.info()
        other = bool(differing) if info.tokenizer_parts else info.tokenizer != tokenizer
        if info.kind == "tropd" and other:
            raise ConfigError(
                f"the teacher at {self.url} ({info.model}) has another tokenizer than the student: "
                f"{info.tokenizer_size} tokens, hash {info.tokenizer[:12]}… against {tokenizer_size}, {tokenizer[:12]}…"
                + (f"; different parts: {', '.join(differing)}" if differing else ""),
                hint="distillation by log-probs needs models that share a tokenizer",
            )
        if info.max_length < needed_length:
            raise ConfigError(
                f"the teacher at {self.url} takes {info.max_length} tokens, but the longest prompt and "
                f"rollout.max_tokens need {needed_length}",
                hint="lower rollout.max_tokens"
                + (f", or start it with --max-model-len {needed_length + 1}" if info.kind == "vllm" else ""),
            )

    def check_token_texts(self, decode: Callable[[list[int]], str], size: int) -> bool:
        """Compare the text of every token id with the student's at each vLLM server that has answered.

        Returns False if one of them does not say.

        Raises:
            ConfigError: with the first id that differs.
        """

        def compare(exchange: Exchange, dialect: Dialect) -> bool:
            return not isinstance(dialect, VllmDialect) or dialect.check_tokenizer(exchange, decode, size)

        self.info()
        return all(self._replicas.each(compare))

    def check_gives(self, needs: TeacherNeeds, objective: Objective) -> None:
        """Refuse a teacher that cannot give what an objective needs, before the first rollout.

        Raises:
            ConfigError: naming the parts of the objective that need it.
        """
        info = self.info()
        # A teacher with a small vocabulary gives all of it, however many are asked for.
        if needs.topk != "none" and info.max_topk < min(needs.k, info.vocab_size):
            raise ConfigError(
                f"objective {objective.name!r} needs the teacher's top {needs.k} ({', '.join(_topk_parts(objective))}), "
                f"but the teacher at {self.url} gives {info.max_topk or 'no'} alternatives",
                hint=(
                    f"start it with --max-logprobs {needs.k + SPARE}, or set a smaller objective.k"
                    if info.kind == "vllm"
                    else "use a tropd teacher service, a smaller objective.k, or an objective that needs log-probs only"
                ),
            )
        # Of a small vocabulary all of it is chosen.
        if info.max_chosen < min(needs.chosen, info.vocab_size):
            raise ConfigError(
                f"objective {objective.name!r} asks the teacher for log-probs of the student's top {needs.chosen} "
                f"(alternatives = 'student'), but the teacher at {self.url} gives "
                f"{f'those of {info.max_chosen} chosen ids' if info.max_chosen else 'no log-probs of chosen ids'}",
                hint=(
                    "a vLLM server reports its own likeliest ids only: use tropd serve-teacher"
                    if info.kind == "vllm"
                    else "use tropd serve-teacher of this version on transformers, or a smaller objective.k"
                )
                + ", or set objective.alternatives = 'teacher'",
            )
        if needs.entropy and not info.entropy:
            raise ConfigError(
                f"objective {objective.name!r} needs the teacher's entropy ({entropy_part(objective)}), "
                f"which the teacher at {self.url} does not give",
                hint=f"use a tropd teacher service, or another {entropy_part(objective).split()[0]}",
            )

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Have all sequences scored, in as many requests as the servers' number and limits ask for.

        Raises:
            TropdError: no answer within the time limit, a refusal, or an answer that does not check out.
        """
        parts = split_request(request, self.info(), servers=len(self.replicas), where=self.url)
        if len(self.replicas) == 1:
            answers = [self._score_part(part) for part in parts]
        else:
            answers = side_by_side(self._score_part, parts, len(self.replicas))
        return ScoreResponse([item for answer in answers for item in answer.items])

    def score_some(self, request: ScoreRequest) -> ScoreResponse:
        """Have some of a step's sequences scored, in one request if the limits allow it, by any server.

        So many threads may do so at once as there are servers: then each server has one request at a time.

        Raises:
            TropdError: as ``score``.
        """
        parts = split_request(request, self.info(), servers=1, where=self.url)
        return ScoreResponse([item for part in parts for item in self._score_part(part).items])

    def _score_part(self, part: ScoreRequest) -> ScoreResponse:
        started = time.monotonic()

        def work(exchange: Exchange, dialect: Dialect) -> tuple[Exchange, ScoreResponse]:
            answer = dialect.score(exchange, part)
            if answer.teacher != self.info().weights:
                self._replicas.check_unchanged(exchange.url)
                raise TropdError(
                    f"the teacher at {exchange.url} gave scores of weights {answer.teacher[:12]}…"
                )
            self._check_masks(exchange.url, part, answer)
            return exchange, answer

        exchange, answer = self._replicas.call(work, sum(len(item.tokens) for item in part.sequences))
        with self._lock:
            self.requests += 1
            self.seconds += time.monotonic() - started
            self.queue_seconds += exchange.queued_told
            self.bytes_sent += exchange.sent
            self.bytes_received += exchange.received
            self.tokens_scored += sum(len(item.teacher_logprobs) for item in answer.items)
            self.topk_tokens += sum(len(item.topk_positions) for item in answer.items)
        return answer

    def _check_masks(self, url: str, request: ScoreRequest, response: ScoreResponse) -> None:
        """Trainer and service must draw the same regions, and alternatives must be where they were asked for."""
        for number, (asked, item) in enumerate(zip(request.sequences, response.items, strict=True)):
            outlier = outlier_mask(request, asked, item.teacher_logprobs, item.entropy)
            if not np.array_equal(item.trusted, ~outlier):
                raise TropdError(
                    f"the teacher at {url} partitioned sequence {number} differently from this client"
                )
            wanted = {"none": np.zeros_like(outlier), "outliers": outlier, "all": np.ones_like(outlier)}[
                request.topk
            ]
            if not np.array_equal(item.topk_positions, np.flatnonzero(wanted)):
                raise TropdError(
                    f"the teacher at {url} gave alternatives for tokens other than those asked for"
                )
            k = min(request.k, request.vocab_limit, self.info().vocab_size)
            if len(item.topk_positions) and item.topk_ids.shape[1] != k:
                raise TropdError(
                    f"the teacher at {url} gave {item.topk_ids.shape[1]} alternatives per token, not {k}"
                )


def _topk_parts(objective: Objective) -> list[str]:
    """Parts of an objective that need alternatives, under their configuration paths."""
    parts = [
        f"{region}.loss.estimator = {loss.estimator!r}"
        for region, loss in (("trust", objective.trust.loss), ("outlier", objective.outlier.loss))
        if needs_topk(loss)
    ]
    return parts + [f"token_weights: {w.kind}" for w in objective.token_weights if w.kind in TOPK_WEIGHTS]
