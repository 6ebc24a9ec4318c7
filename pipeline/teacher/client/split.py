"""A step's sequences cut into requests that fit, and the requests worked on side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest, ScoreResponse
from tropd.storage.errors import ConfigError

ROW_BYTES, MESSAGE_BYTES = 32, 2048
"""Upper bounds of a sequence's and a request's bytes beside token ids and log-probs (20 and 1,136 measured)."""


def split_request(
    request: ScoreRequest, limits: ServiceInfo, *, servers: int, where: str
) -> list[ScoreRequest]:
    """Consecutive parts within the limits of tokens and bytes, and a share for each server; always cut the same way.

    Args:
        where: the servers, as errors name them.

    Raises:
        ConfigError: one sequence alone is above a limit.
    """
    total = sum(len(item.tokens) for item in request.sequences)
    parts: list[list[ScoreItem]] = []
    tokens = size = seen = 0
    last = -1
    for number, item in enumerate(request.sequences):
        n = len(item.tokens)
        cost = item.tokens.nbytes + item.student_logprobs.nbytes + ROW_BYTES
        cost += 0 if item.chosen is None else item.chosen.nbytes
        if n > limits.max_request_tokens or cost + MESSAGE_BYTES > limits.max_request_bytes:
            raise ConfigError(
                f"sequence {number} has {n} tokens; the teacher at {where} takes {limits.max_request_tokens} "
                f"tokens and {limits.max_request_bytes} bytes a request",
                hint="raise service.max_request_tokens or service.max_request_bytes where the service runs",
            )
        share = (2 * seen + n) * servers // (2 * total)  # where the sequence's middle is
        fits = tokens + n <= limits.max_request_tokens and size + cost <= limits.max_request_bytes
        if not fits or share != last:
            parts.append([])
            tokens, size, last = 0, MESSAGE_BYTES, share
        parts[-1].append(item)
        tokens, size, seen = tokens + n, size + cost, seen + n
    return [replace(request, sequences=part) for part in parts]


def side_by_side(
    work: Callable[[ScoreRequest], ScoreResponse], parts: Sequence[ScoreRequest], threads: int
) -> list[ScoreResponse]:
    """The answers of all parts in order, of which so many are worked on at once; the first failure is raised.

    The threads are daemons: a caller that interrupts the wait for them does not have to wait for an answer first.
    """
    todo: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, ScoreResponse | BaseException]] = SimpleQueue()
    for number in range(len(parts)):
        todo.put(number)

    def run() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((number, work(parts[number])))
            except BaseException as error:
                done.put((number, error))
                return

    for _ in range(min(threads, len(parts))):
        threading.Thread(target=run, name="teacher-client", daemon=True).start()
    answers: dict[int, ScoreResponse] = {}
    while len(answers) < len(parts):
        number, answer = done.get()
        if isinstance(answer, BaseException):
            while not todo.empty():  # the rest is no longer wanted
                with contextlib.suppress(Empty):
                    todo.get_nowait()
            raise answer
        answers[number] = answer
    return [answers[number] for number in range(len(parts))]
