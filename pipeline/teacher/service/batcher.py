"""The queue of the service: waiting requests are scored together, up to a budget of tokens, by one worker thread.

Clients take turns. Whole requests are merged, never split, and none that asks to be alone: what is in a batch changes the
rounding of its scores, so only a client that is never merged gets bit-identical answers in a repeated run.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tropd.pipeline.models.engines.base import Engine, SequenceScores
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.objectives.partition import partition_tokens
from tropd.pipeline.teacher.service.access_log import Timing
from tropd.pipeline.teacher.service.fair_queue import FairQueue
from tropd.pipeline.teacher.wire.messages import ScoredItem, ScoreItem, ScoreRequest, ScoreResponse, log_tail
from tropd.storage.bounds import are_logprobs
from tropd.storage.seeds import uniforms

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More tokens are waiting than the service accepts."""


class StoppingError(Exception):
    """The service takes no more requests."""


class TeacherOutputError(Exception):
    """The teacher gave NaN or positive log-probs; they are never passed on."""


@dataclass
class _Job:
    request: ScoreRequest
    tokens: int
    timing: Timing
    alone: bool = False
    future: Future[ScoreResponse] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


class Batcher:
    """Owns the engine. ``submit`` may be called from any thread.

    Args:
        batch_tokens: requests are merged while their tokens stay within this.
        queue_tokens: most tokens that may wait; a client that has none waiting may always send a request.
        on_batch: called with (sequences, tokens, seconds) of every forward batch.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int,
        queue_tokens: int,
        on_batch: Callable[[int, int, float], None] = lambda sequences, tokens, seconds: None,
    ) -> None:
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._on_batch = on_batch
        self._jobs: FairQueue[_Job] = FairQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="teacher-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens accepted and not yet scored."""
        return self._waiting

    def submit(
        self, request: ScoreRequest, timing: Timing | None = None, client: str = "", alone: bool = False
    ) -> Future[ScoreResponse]:
        """Queue a request. ``timing`` is filled in before its answer is ready.

        Args:
            client: whose turn it takes; all without a name share one.
            alone: it is not merged with others.

        Raises:
            QueueFullError: it does not fit beside the waiting requests. An empty queue takes any request.
            StoppingError: after ``close``.
        """
        tokens = sum(len(item.tokens) for item in request.sequences)
        job = _Job(request, tokens, timing or Timing(), alone)
        with self._lock:
            if self._closed:  # it would never be answered
                raise StoppingError("the service is stopping")
            first = bool(client) and not self._jobs.has(client)
            if self._waiting and self._waiting + tokens > self._queue_tokens and not first:
                raise QueueFullError(
                    f"{self._waiting} tokens are waiting, {tokens} more exceed {self._queue_tokens}"
                )
            self._waiting += tokens
            self._jobs.put(client, job)
        return job.future

    def close(self, timeout: float | None = None) -> None:
        """Finish the queue, then stop; leave the worker running if that takes longer than ``timeout`` seconds."""
        with self._lock:
            self._closed = True
            self._jobs.close()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            jobs = self._next_batch()
            if jobs is None:
                return
            try:
                self._run(jobs)
            finally:
                with self._lock:
                    self._waiting -= sum(job.tokens for job in jobs)

    def _next_batch(self) -> list[_Job] | None:
        """The job whose turn it is, and, unless it is alone, those after it that share its options and fit the budget."""
        first = self._jobs.take()
        if first is None:
            return None
        batch, tokens = [first], first.tokens

        def fits(job: _Job) -> bool:
            if first.alone or job.alone or tokens + job.tokens > self._batch_tokens:
                return False
            return _options(job) == _options(first)

        while tokens < self._batch_tokens and (job := self._jobs.take_if(fits)) is not None:
            batch.append(job)
            tokens += job.tokens
        return batch

    def _run(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        started = time.monotonic()
        for job in jobs:
            job.timing.queue_ms = (started - job.queued_at) * 1000
        try:
            answers = score_requests(self._engine, [job.request for job in jobs])
        except Exception as error:
            _stop_clocks(jobs, started)
            if len(jobs) == 1:
                logger.exception("scoring failed")
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # find the culprit: its batch mates get their answers
                try:
                    answer = score_requests(self._engine, [job.request])[0]
                    _stop_clocks([job], started)
                    job.future.set_result(answer)
                except Exception as own_error:
                    _stop_clocks([job], started)
                    logger.exception("scoring failed")
                    job.future.set_exception(own_error)
            return
        self._on_batch(
            sum(len(j.request.sequences) for j in jobs),
            sum(j.tokens for j in jobs),
            time.monotonic() - started,
        )
        _stop_clocks(jobs, started)
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)


def _stop_clocks(jobs: Sequence[_Job], started: float) -> None:
    for job in jobs:
        job.timing.engine_ms = (time.monotonic() - started) * 1000


def _options(job: _Job) -> tuple[object, ...]:
    request = job.request
    chosen = (request.chosen, request.overlap)
    return (request.topk, request.k, request.entropy, request.vocab_limit, request.partition, chosen)


def score_requests(engine: Engine, requests: Sequence[ScoreRequest]) -> list[ScoreResponse]:
    """Answer requests that share their options with one call of the engine.

    Raises:
        TeacherOutputError: NaN or positive log-probs.
    """
    if not requests:
        return []
    options = requests[0]
    items = [item for request in requests for item in request.sequences]
    masks: dict[int, npt.NDArray[np.bool_]] = {}

    def outliers(
        index: int, token_logprobs: npt.NDArray[np.float32], entropy: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.bool_]:
        masks[index] = outlier_mask(options, items[index], token_logprobs, entropy)
        return masks[index] if options.topk == "outliers" else np.ones(len(token_logprobs), dtype=np.bool_)

    chosen = [item.chosen for item in items if item.chosen is not None]
    more: dict[str, Any] = {"chosen": chosen, "overlap": options.overlap} if options.chosen else {}
    with within_memory("the teacher's scores of a request", "lower service.batch_tokens"):
        scores = engine.score(
            [item.tokens.tolist() for item in items],
            [item.start for item in items],
            k=0 if options.topk == "none" else options.k,
            entropy=options.entropy,
            topk_where=outliers,
            vocab_limit=options.vocab_limit,
            **more,
        )
    answers = []
    for index, (item, scored) in enumerate(zip(items, scores, strict=True)):
        _check(scored)
        if index not in masks:  # without top-k the engine has no reason to ask
            masks[index] = outlier_mask(options, item, scored.token_logprobs, scored.entropy)
        answers.append(_answer(scored, masks[index]))
    bounds = np.cumsum([0, *(len(request.sequences) for request in requests)]).tolist()
    return [ScoreResponse(answers[low:high]) for low, high in itertools.pairwise(bounds)]


def outlier_mask(
    request: ScoreRequest,
    item: ScoreItem,
    teacher_logprobs: npt.NDArray[np.float32],
    entropy: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.bool_]:
    """``[n]`` the scored tokens that have outlier weight; service and client compute it alike."""
    regions = partition_tokens(
        request.partition,
        student_logprobs=item.student_logprobs,
        teacher_logprobs=np.minimum(teacher_logprobs, np.float32(0.0)),
        uniforms=uniforms(item.seed, np.arange(item.start, len(item.tokens))),
        teacher_entropy=entropy,
    )
    return regions.outlier > 0


def _check(scored: SequenceScores) -> None:
    of_chosen = [] if scored.chosen is None else [scored.chosen.logprobs, scored.chosen.tail]
    for values in (scored.token_logprobs, scored.topk_logprobs, *of_chosen):
        if not are_logprobs(values):
            raise TeacherOutputError("the teacher gave NaN or positive log-probs")
    if scored.entropy is not None and not np.isfinite(scored.entropy).all():
        raise TeacherOutputError("the teacher gave an entropy that is not finite")


def _answer(scored: SequenceScores, outlier: npt.NDArray[np.bool_]) -> ScoredItem:
    topk_logprobs = np.minimum(scored.topk_logprobs, np.float32(0.0))
    return ScoredItem(
        teacher_logprobs=np.minimum(scored.token_logprobs, np.float32(0.0)),
        trusted=~outlier,
        entropy=scored.entropy,
        topk_positions=scored.topk_positions.astype(np.int32),
        topk_ids=scored.topk_ids,
        topk_logprobs=topk_logprobs,
        tail=log_tail(topk_logprobs),
        chosen_logprobs=None if scored.chosen is None else scored.chosen.logprobs,
        chosen_tail=None if scored.chosen is None else scored.chosen.tail,
        chosen_overlap=None if scored.chosen is None else scored.chosen.overlap,
    )
