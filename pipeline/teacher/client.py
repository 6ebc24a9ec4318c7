"""The client of the teacher service: splits, retries, checks every answer, and never makes up a score."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import TracebackType

import httpx
import numpy as np
import tenacity
from pydantic import ValidationError

from tropd.pipeline.objectives.spec import TOPK_WEIGHTS, Objective, TeacherNeeds, needs_topk
from tropd.pipeline.teacher.batcher import outlier_mask
from tropd.pipeline.teacher.protocol import (
    CONTENT_TYPE,
    PROTOCOL_VERSION,
    ProtocolError,
    ScoredItem,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    decode_response,
    encode_request,
)
from tropd.pipeline.teacher.service import ServiceInfo
from tropd.storage.errors import ConfigError, TropdError

CONNECT_SECONDS = 10.0
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
LAST_ATTEMPT_SECONDS = 1.0
"""What an attempt gets at least, also the one at the end of the time."""
ROW_BYTES, MESSAGE_BYTES = 32, 2048
"""Upper bounds of what a sequence and a request cost beside token ids and log-probs (20 and 1,136 measured)."""


class _TryAgainError(Exception):
    """An answer that may be different next time. ``after`` is the wait that the service asks for."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class TeacherClient:
    """Talks to one service, one request at a time. Use as a context manager.

    Args:
        url: of the service.
        token: bearer token, if it wants one.
        timeout_seconds: how long a request is retried before ``score`` gives up.
        on_wait: told once per outage why nothing happens.

    Raises:
        ConfigError: ``url`` is no URL, or ``token`` cannot be sent.

    Counts what was answered: ``requests``, ``seconds`` of waiting for their answers (outages included),
    ``tokens_scored``, ``topk_tokens``, ``bytes_sent``, ``bytes_received``; and ``retries``.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 300.0,
        on_wait: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.url = url.rstrip("/")
        self.tokens_scored = 0
        self.topk_tokens = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.requests = 0
        self.retries = 0
        self.seconds = 0.0
        self._timeout = timeout_seconds
        self._on_wait = on_wait
        self._info: ServiceInfo | None = None
        if token and not (token.isascii() and token.isprintable()):
            raise ConfigError(
                "the bearer token has characters that no HTTP header takes",
                hint="use printable ASCII characters only, in the environment of service and trainer",
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # trust_env is off: a proxy from the environment must not see what goes to a loopback service.
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, trust_env=False)
        except httpx.InvalidURL as error:
            raise ConfigError(f"the teacher's address {url!r} is no URL: {error}") from error

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def info(self) -> ServiceInfo:
        """Identity and limits of the service (asked once).

        Raises:
            TropdError: it does not answer, or is not a service of this protocol.
        """
        if self._info is None:
            response = self._retrying(partial(self._http.get, "/v1/info"))
            try:
                self._info = ServiceInfo.model_validate_json(response.content)
            except ValidationError as error:
                raise TropdError(
                    f"{self.url} is not a tropd teacher service",
                    hint="start one with: tropd serve-teacher -w WORKSPACE",
                ) from error
            if self._info.protocol != PROTOCOL_VERSION:
                raise TropdError(
                    f"{self.url} speaks protocol {self._info.protocol}, this client {PROTOCOL_VERSION}",
                    hint="run service and trainer with the same version of tropd",
                )
        return self._info

    def check_compatible(self, tokenizer: str, tokenizer_size: int, needed_length: int) -> None:
        """Refuse a teacher that does not fit the student.

        Raises:
            ConfigError: other tokenizer, or a context that is too short; with both values.
        """
        info = self.info()
        if info.tokenizer != tokenizer:
            raise ConfigError(
                f"the teacher at {self.url} ({info.model}) has another tokenizer than the student: "
                f"{info.tokenizer_size} tokens, hash {info.tokenizer[:12]}… against {tokenizer_size}, {tokenizer[:12]}…",
                hint="distillation by log-probs needs models that share a tokenizer",
            )
        if info.max_length < needed_length:
            raise ConfigError(
                f"the teacher at {self.url} takes {info.max_length} tokens, but the longest prompt and "
                f"rollout.max_tokens need {needed_length}",
                hint="lower rollout.max_tokens",
            )

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
                hint="use a tropd teacher service, a smaller objective.k, or an objective that needs log-probs only",
            )
        if needs.entropy and not info.entropy:
            raise ConfigError(
                f"objective {objective.name!r} needs the teacher's entropy (partition.rule = 'teacher_entropy'), "
                f"which the teacher at {self.url} does not give",
                hint="use a tropd teacher service, or another partition rule",
            )

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Have all sequences scored, in as many requests as the service's limits ask for.

        Raises:
            TropdError: no answer within the time limit, a refusal, or an answer that does not check out.
        """
        items: list[ScoredItem] = []
        headers = {"Content-Type": CONTENT_TYPE}
        for part in self._split(request):
            body = encode_request(part)
            retries, started = self.retries, time.monotonic()
            response = self._retrying(partial(self._http.post, "/v1/score", content=body, headers=headers))
            if self.retries > retries:
                self._check_unchanged()
            try:
                answer = decode_response(response.content, part)
            except ProtocolError as error:
                raise TropdError(f"the teacher at {self.url} gave an unusable answer: {error}") from error
            if answer.teacher != self.info().weights:
                self._check_unchanged()
                raise TropdError(f"the teacher at {self.url} gave scores of weights {answer.teacher[:12]}…")
            self._check_masks(part, answer)
            self.requests += 1
            self.seconds += time.monotonic() - started
            self.bytes_sent += len(body)
            self.bytes_received += len(response.content)
            self.tokens_scored += sum(len(item.teacher_logprobs) for item in answer.items)
            self.topk_tokens += sum(len(item.topk_positions) for item in answer.items)
            items.extend(answer.items)
        return ScoreResponse(items)

    def _check_unchanged(self) -> None:
        """The service must still be the one that was checked at the start, not another teacher at its address.

        Raises:
            TropdError: it is another.
        """
        before, self._info = self.info(), None
        now = self.info()
        if (now.weights, now.tokenizer) != (before.weights, before.tokenizer):
            raise TropdError(
                f"another teacher came back at {self.url}: {now.model} with weights {now.weights[:12]}…, "
                f"before it was {before.model} with {before.weights[:12]}…",
                hint="start the service of the first one again, and rerun the same command",
            )

    def _split(self, request: ScoreRequest) -> list[ScoreRequest]:
        """Consecutive parts within the service's limits of tokens and bytes; always cut the same way.

        Raises:
            ConfigError: one sequence alone is above a limit.
        """
        info = self.info()
        parts: list[list[ScoreItem]] = []
        tokens = size = 0
        for number, item in enumerate(request.sequences):
            n = len(item.tokens)
            cost = item.tokens.nbytes + item.student_logprobs.nbytes + ROW_BYTES
            if n > info.max_request_tokens or cost + MESSAGE_BYTES > info.max_request_bytes:
                raise ConfigError(
                    f"sequence {number} has {n} tokens; the teacher at {self.url} takes {info.max_request_tokens} "
                    f"tokens and {info.max_request_bytes} bytes a request",
                    hint="raise service.max_request_tokens or service.max_request_bytes where the service runs",
                )
            fits = tokens + n <= info.max_request_tokens and size + cost <= info.max_request_bytes
            if not parts or not fits:
                parts.append([])
                tokens, size = 0, MESSAGE_BYTES
            parts[-1].append(item)
            tokens, size = tokens + n, size + cost
        fields = (request.partition, request.topk, request.k, request.entropy, request.vocab_limit)
        return [ScoreRequest(part, *fields) for part in parts]

    def _check_masks(self, request: ScoreRequest, response: ScoreResponse) -> None:
        """Trainer and service must draw the same regions, and alternatives must be where they were asked for."""
        for number, (asked, item) in enumerate(zip(request.sequences, response.items, strict=True)):
            outlier = outlier_mask(request, asked, item.teacher_logprobs, item.entropy)
            if not np.array_equal(item.trusted, ~outlier):
                raise TropdError(
                    f"the teacher at {self.url} partitioned sequence {number} otherwise than this client"
                )
            wanted = {"none": np.zeros_like(outlier), "outliers": outlier, "all": np.ones_like(outlier)}[
                request.topk
            ]
            if not np.array_equal(item.topk_positions, np.flatnonzero(wanted)):
                raise TropdError(f"the teacher at {self.url} gave alternatives for other tokens than asked")
            k = min(request.k, request.vocab_limit, self.info().vocab_size)
            if len(item.topk_positions) and item.topk_ids.shape[1] != k:
                raise TropdError(
                    f"the teacher at {self.url} gave {item.topk_ids.shape[1]} alternatives per token, not {k}"
                )

    def _retrying(self, send: Callable[..., httpx.Response]) -> httpx.Response:
        """Send until there is an answer; requests are idempotent, so a lost answer may be asked for again.

        All attempts together get ``timeout_seconds``, so a service that accepts and never answers cannot double it.
        """
        started = time.monotonic()

        def attempt() -> httpx.Response:
            left = max(self._timeout - (time.monotonic() - started), min(LAST_ATTEMPT_SECONDS, self._timeout))
            try:
                response = send(timeout=httpx.Timeout(left, connect=min(CONNECT_SECONDS, left)))
            except httpx.UnsupportedProtocol as error:
                raise ConfigError(f"the teacher's address {self.url!r} is not http: {error}") from error
            except httpx.TransportError as error:
                raise _TryAgainError(f"{type(error).__name__}: {error}") from error
            except httpx.RequestError as error:  # such as a body that is not encoded as its header says
                raise TropdError(f"the teacher at {self.url} gave an unusable answer: {error}") from error
            if response.status_code in (408, 429, 502, 503, 504):
                raise _TryAgainError(_reason(response), _retry_after(response))
            return response

        def wait(state: tenacity.RetryCallState) -> float:
            self.retries += 1
            error = state.outcome.exception() if state.outcome else None
            if state.attempt_number == 1:
                self._on_wait(
                    f"the teacher at {self.url} does not answer ({error}); waiting, nothing is lost"
                )
            jittered = tenacity.wait_random_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)(state)
            wanted = max(jittered, error.after if isinstance(error, _TryAgainError) else 0.0)
            left = self._timeout - (time.monotonic() - started)
            return max(0.0, min(wanted, left))  # the last attempt is made when the time is up, not later

        try:
            response = tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(_TryAgainError),
                stop=tenacity.stop_after_delay(self._timeout),
                wait=wait,
                reraise=True,
            )(attempt)
        except _TryAgainError as error:
            raise TropdError(
                f"the teacher at {self.url} gave no answer for {time.monotonic() - started:.0f} s (last: {error})",
                hint="see its log, start it again, and rerun the same command: it goes on from the last checkpoint",
            ) from error
        if response.status_code != httpx.codes.OK:
            raise TropdError(
                f"the teacher at {self.url} refused with {response.status_code}: {_reason(response)}",
                hint="see the service's log" if response.status_code >= 500 else None,
            )
        return response


def _topk_parts(objective: Objective) -> list[str]:
    """Parts of an objective that need alternatives, under their configuration paths."""
    parts = [
        f"{region}.loss.estimator = {loss.estimator!r}"
        for region, loss in (("trust", objective.trust.loss), ("outlier", objective.outlier.loss))
        if needs_topk(loss)
    ]
    return parts + [f"token_weights: {w.kind}" for w in objective.token_weights if w.kind in TOPK_WEIGHTS]


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
