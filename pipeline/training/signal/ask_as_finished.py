"""Asking the teacher about rows as they are finished, while others of the step are still written.

What shares a request changes the rounding of its scores. Which rows do is therefore decided before any is written; when a
request is sent depends on how fast they are.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from tropd.pipeline.teacher.wire.messages import ScoredItem
from tropd.pipeline.training.rollout.rows import Row, RowPlan


@dataclass(frozen=True)
class PlannedRequest:
    """Rows that one teacher is asked about together."""

    teacher: str
    rows: tuple[int, ...]
    """Their seeds, by which the rows of a step are known."""


def plan_requests(
    plans: Sequence[RowPlan],
    *,
    teacher_of: Callable[[RowPlan], str],
    servers: Mapping[str, int],
    max_tokens: int,
    pass_tokens: int,
) -> list[PlannedRequest]:
    """Consecutive rows of a teacher, as many as it passes over at once if all get as long as they may.

    Args:
        servers: of each teacher, each of which gets a share of the rows.
        max_tokens: of a response with its prefix.
        pass_tokens: that a teacher passes over at once.
    """
    by_teacher: dict[str, list[RowPlan]] = defaultdict(list)
    for plan in plans:
        by_teacher[teacher_of(plan)].append(plan)
    requests = []
    for name, own in by_teacher.items():
        lengths = [
            len(plan.prompt_tokens if plan.teacher_tokens is None else plan.teacher_tokens) + max_tokens
            for plan in own
        ]
        room = min(pass_tokens, -(-sum(lengths) // servers[name]))
        together: list[int] = []
        tokens = 0
        for plan, length in zip(own, lengths, strict=True):
            if together and tokens + length > room:
                requests.append(PlannedRequest(name, tuple(together)))
                together, tokens = [], 0
            together.append(plan.seed)
            tokens += length
        requests.append(PlannedRequest(name, tuple(together)))
    return requests


class AskedAsFinished:
    """Sends each request as soon as its last row is finished. It ends with ``answers`` or ``give_up``.

    Every server of a teacher has a thread that waits for it. The threads are daemons: a caller that is interrupted does
    not have to wait for an answer first.

    Args:
        servers: of each teacher: so many of its requests are under way at once.
        ask: the answers of a teacher about these rows, in order; called in any of the threads.
    """

    def __init__(
        self,
        requests: Sequence[PlannedRequest],
        servers: Mapping[str, int],
        ask: Callable[[str, list[Row]], list[ScoredItem]],
    ) -> None:
        self._count = len(requests)
        self._ask = ask
        self._servers = servers
        self._request_of = {row: request for request in requests for row in request.rows}
        self._rows: dict[int, Row] = {}
        self._ready: dict[str, SimpleQueue[PlannedRequest | None]] = {name: SimpleQueue() for name in servers}
        self._answered: SimpleQueue[dict[int, ScoredItem] | BaseException] = SimpleQueue()
        self._over = False
        for name, number in servers.items():
            for _ in range(number):
                threading.Thread(target=self._send, args=(name,), name="ask-teacher", daemon=True).start()

    def finished(self, row: Row) -> None:
        """Take a row; its request goes off if it was the last one that this lacked."""
        self._rows[row.plan.seed] = row
        request = self._request_of[row.plan.seed]
        if all(seed in self._rows for seed in request.rows):
            self._ready[request.teacher].put(request)

    def answers(self) -> dict[int, ScoredItem]:
        """The answers about all rows that have tokens, by the rows' seeds. All rows must have been taken.

        Raises:
            BaseException: the first that ``ask`` has raised.
        """
        found: dict[int, ScoredItem] = {}
        try:
            for _ in range(self._count):
                answer = self._answered.get()
                if isinstance(answer, BaseException):
                    raise answer
                found |= answer
        finally:
            self.give_up()
        return found

    def give_up(self) -> None:
        """Send nothing more."""
        self._over = True
        for name, number in self._servers.items():
            for _ in range(number):
                self._ready[name].put(None)

    def _send(self, teacher: str) -> None:
        while (request := self._ready[teacher].get()) is not None and not self._over:
            rows = [self._rows[seed] for seed in request.rows if self._rows[seed].tokens]
            try:
                answers = self._ask(teacher, rows) if rows else []
                found = {row.plan.seed: one for row, one in zip(rows, answers, strict=True)}
            except BaseException as error:
                self._answered.put(error)
                return
            self._answered.put(found)
