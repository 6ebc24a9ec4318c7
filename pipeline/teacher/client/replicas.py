"""The servers behind one client: choose a server, back off after failures, verify that all serve the same teacher."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
import tenacity

from tropd.pipeline.teacher.client.dialects import Dialect, identify
from tropd.pipeline.teacher.client.http import CONNECT_SECONDS, Exchange, ServerFaultError, TryAgainError
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.storage.errors import ConfigError, TropdError

FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
LAST_ATTEMPT_SECONDS = 1.0
"""Shortest time limit of an attempt, also of the one at the end of the time."""
PROBE_SECONDS = 2.0
"""Time limit of a server that has failed, where others could be asked instead."""

Reply = TypeVar("Reply")
Asking = Callable[[Exchange, Dialect], Reply]
"""A piece of work that any server can do."""


@dataclass
class Replica:
    """One server, with its failures and outstanding work."""

    url: str
    dialect: Dialect | None = None
    """Its protocol; None until it has identified itself, and again after each failure."""
    before: ServiceInfo | None = None
    """The last description that it gave of itself."""
    outstanding: int = 0
    """Tokens sent and not yet answered."""
    requests: int = 0
    """Answered requests."""
    retries: int = 0
    """Failed attempts that were followed by another, here or elsewhere."""
    failures: int = 0
    """Failed attempts since the last answer."""
    rest_seconds: float = 0.0
    """How long it rests after its last failure."""
    rests_until: float = 0.0
    """No request goes here before this time while another server is ready."""


class Replicas:
    """Hands each piece of work to the server with the fewest outstanding tokens; any thread may call.

    Args:
        urls: of the servers, without a slash at the end.
        http: the client that makes the requests.
        timeout_seconds: all attempts at a piece of work together, without the time in servers' queues.
        on_wait: called once per outage of a server, and when it is back.
        sleep: waits the given seconds; may raise to end the wait.
    """

    def __init__(
        self,
        urls: Sequence[str],
        http: httpx.Client,
        *,
        timeout_seconds: float,
        on_wait: Callable[[str], None],
        sleep: Callable[[float], None],
    ) -> None:
        self.all = [Replica(url) for url in urls]
        self._http = http
        self._timeout = timeout_seconds
        self._on_wait = on_wait
        self._sleep = sleep
        self._lock = threading.Lock()
        self._teacher: ServiceInfo | None = None

    @property
    def infos(self) -> list[ServiceInfo]:
        """The descriptions of the servers that have answered."""
        return [replica.before for replica in self.all if replica.before is not None]

    def greet(self) -> None:
        """Asking every server once for its identity. One that does not answer is asked again when its turn comes.

        Raises:
            ConfigError: two of them have different teachers.
        """
        for replica in self.all:
            try:
                self._known(replica, min(CONNECT_SECONDS, self._timeout))
            except TryAgainError as error:
                self._failed(replica, error)

    def call(self, work: Asking[Reply], tokens: int = 0) -> Reply:
        """Have ``work`` done by a server, by another one if that fails, until the time is up.

        Raises:
            TropdError: no server did it in time, a server refused, or all failed at it.
        """
        started = time.monotonic()
        failed: list[Replica] = []
        faults: set[str] = set()
        queued = 0.0

        def left() -> float:
            return self._timeout + queued - (time.monotonic() - started)

        def attempt() -> Reply:
            nonlocal queued
            replica = self._pick(tokens, failed, faults)
            untried = [r for r in self.all if r is not replica and r not in failed]
            seconds = max(left() / (1 + len(untried)), min(LAST_ATTEMPT_SECONDS, self._timeout))
            failed.append(replica)
            exchange = None
            try:
                # A server that has failed may still be away: the others are not kept waiting for it.
                probe = min(PROBE_SECONDS, seconds) if replica.failures and untried else seconds
                dialect = self._known(replica, probe)
                exchange = Exchange(self._http, replica.url, seconds)
                answer = work(exchange, dialect)
            except ServerFaultError as error:
                faults.add(replica.url)
                if len(faults) == len(self.all):
                    raise
                again = TryAgainError(error.message)
                self._failed(replica, again)
                raise again from error
            except TryAgainError as error:
                self._failed(replica, error)
                raise
            finally:
                queued += exchange.queued if exchange is not None else 0.0
                with self._lock:
                    replica.outstanding -= tokens
            self._answered(replica)
            return answer

        def wait(state: tenacity.RetryCallState) -> float:
            last, now = failed[-1], time.monotonic()
            last.retries += 1
            rests = [
                r.rest_seconds if r is last else r.rests_until - now for r in self.all if r.url not in faults
            ]
            # The last attempt is made when the time is up, not later.
            return max(0.0, min(*rests, left()))

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(TryAgainError),
                stop=lambda state: left() <= 0.0,
                wait=wait,
                sleep=self._sleep,
                reraise=True,
            )(attempt)
        except TryAgainError as error:
            where = ", ".join(dict.fromkeys(replica.url for replica in failed))
            raise TropdError(
                f"the teacher at {where} gave no answer for {time.monotonic() - started:.0f} s (last: {error})",
                hint="see its log, start it again, and rerun the same command: it resumes from the last checkpoint",
            ) from error

    def each(self, work: Asking[Reply]) -> list[Reply]:
        """Do work once at every known server; one that is away now is left out.

        Raises:
            TropdError: one of them refused.
        """
        answers = []
        for replica in self.all:
            if replica.dialect is None:
                continue
            try:
                answers.append(work(Exchange(self._http, replica.url, self._timeout), replica.dialect))
            except TryAgainError as error:
                self._failed(replica, error)
        return answers

    def check_unchanged(self, url: str) -> None:
        """The server at an address must still have the teacher that it had.

        Raises:
            TropdError: it has another.
            TryAgainError: it does not answer.
        """
        replica = next(r for r in self.all if r.url == url)
        replica.dialect = None
        self._known(replica, min(CONNECT_SECONDS, self._timeout))

    def _pick(self, tokens: int, failed: Sequence[Replica], faults: set[str]) -> Replica:
        """The server with the fewest outstanding tokens, of those that do not rest; else the first to end its rest.

        Those come last that have failed at this work, and those never that would fail again.
        """
        with self._lock:
            now = time.monotonic()
            able = [r for r in self.all if r.url not in faults]
            ready = [r for r in able if r.rests_until <= now]
            if ready:
                chosen = min(ready, key=lambda r: (failed.count(r), r.outstanding))
            else:
                chosen = min(able, key=lambda r: r.rests_until)
            chosen.outstanding += tokens
            return chosen

    def _known(self, replica: Replica, seconds: float) -> Dialect:
        """The protocol of a server, which must have the teacher that it and all others had before."""
        known = replica.dialect
        if known is not None:
            return known
        dialect = identify(Exchange(self._http, replica.url, seconds))
        now, before = dialect.info, replica.before
        with self._lock:
            teacher = self._teacher = self._teacher or now
        if (now.weights, now.tokenizer) != (teacher.weights, teacher.tokenizer):
            if before is None:
                raise ConfigError(
                    f"teacher.url: the servers have different teachers: {self.all[0].url} has "
                    f"{_shown(teacher)}, {replica.url} has {_shown(now)}",
                    hint="name servers of one teacher",
                )
            raise TropdError(
                f"another teacher came back at {replica.url}: {_shown(now)}, before it was {_shown(before)}",
                hint="start the service of the first one again, and rerun the same command",
            )
        replica.dialect, replica.before = dialect, now
        return dialect

    def _failed(self, replica: Replica, error: TryAgainError) -> None:
        with self._lock:
            replica.dialect = None  # a restarted server may hold a different model
            replica.failures += 1
            longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(replica.failures, 30))
            replica.rest_seconds = max(random.uniform(0.0, longest), error.after)
            replica.rests_until = time.monotonic() + replica.rest_seconds
            first = replica.failures == 1
        if first:
            others = "asking the others" if len(self.all) > 1 else "waiting, nothing is lost"
            self._on_wait(f"the teacher at {replica.url} does not answer ({error}); {others}")

    def _answered(self, replica: Replica) -> None:
        with self._lock:
            back = replica.failures > 0
            replica.failures, replica.rests_until = 0, 0.0
            replica.requests += 1
        if back and len(self.all) > 1:
            self._on_wait(f"the teacher at {replica.url} answers again")


def _shown(info: ServiceInfo) -> str:
    return f"{info.model} with weights {info.weights[:12]}…"
