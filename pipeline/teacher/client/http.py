"""One HTTP exchange with a scoring server; separates transient from permanent failures."""

from __future__ import annotations

import math
import threading
import time
import uuid
from queue import Empty, SimpleQueue
from typing import Any, Literal

import httpx

from tropd.pipeline.teacher.wire.headers import QUEUE_HEADER, QUEUED, REQUEST_HEADER, REQUESTS_PATH
from tropd.storage.errors import ConfigError, TropdError

CONNECT_SECONDS = 10.0
LOOK_SECONDS = 5.0
"""Time between two looks at whether a request still waits for its turn."""
PASSING = frozenset({408, 429, 502, 503, 504})
"""Statuses of an answer that may be different next time."""


class TryAgainError(Exception):
    """An answer that may be different next time. ``after`` is the wait in seconds that the server asks for."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class ServerFaultError(TropdError):
    """The server failed at this request (500) and would fail again, but another server may not."""


class Exchange:
    """Requests to one server that share a time limit. Counts the bytes of bodies: ``sent`` and ``received``; and the
    seconds in a queue that put the limit off: ``queued``; and those that the answer tells: ``queued_told``.

    Args:
        http: shared by all servers; used with absolute addresses.
        url: of the server, without a slash at its end.
        seconds: for all requests together.
    """

    def __init__(self, http: httpx.Client, url: str, seconds: float) -> None:
        self.url = url
        self.sent = 0
        self.received = 0
        self.queued = 0.0
        self.queued_told = 0.0
        self._http = http
        self._deadline = time.monotonic() + seconds

    def ask(
        self,
        method: Literal["GET", "POST"],
        path: str,
        content: bytes | None = None,
        content_type: str | None = None,
    ) -> httpx.Response:
        """Send one request. Requests are idempotent, so that a lost answer may be asked for again.

        Raises:
            TryAgainError: no answer, or one of status ``PASSING``.
            ServerFaultError: status 500.
            ConfigError: the address can never work.
            TropdError: a body that is not encoded as its header says.
        """
        left = max(self._deadline - time.monotonic(), 1e-3)
        headers = {"Content-Type": content_type} if content_type else {}
        limit = httpx.Timeout(left, connect=min(CONNECT_SECONDS, left))
        return self._send(method, path, content, headers, limit)

    def ask_in_turn(self, path: str, content: bytes, content_type: str) -> httpx.Response:
        """Post a request for whose turn a service may have to be waited: that time does not count.

        Raises:
            See ``ask``.
        """
        name = uuid.uuid4().hex
        headers = {"Content-Type": content_type, REQUEST_HEADER: name}
        left = max(self._deadline - time.monotonic(), 1e-3)
        limit = httpx.Timeout(left, connect=min(CONNECT_SECONDS, left), read=None)
        answers: SimpleQueue[httpx.Response | BaseException] = SimpleQueue()

        def send() -> None:
            try:
                answers.put(self._send("POST", path, content, headers, limit))
            except BaseException as error:
                answers.put(error)

        # A daemon: whoever gives up the wait does not have to wait for the answer first.
        threading.Thread(target=send, name="teacher-request", daemon=True).start()
        looked = time.monotonic()
        while True:
            try:
                answer = answers.get(timeout=min(LOOK_SECONDS, max(left / 2, 0.05)))
            except Empty:
                queued, now = self._is_queued(name), time.monotonic()
                if queued:
                    self._deadline += now - looked
                    self.queued += now - looked
                left, looked = self._deadline - now, now
                if left <= 0.0:
                    raise TryAgainError(
                        "no answer in time, and the request no longer waited for its turn"
                    ) from None
                continue
            if isinstance(answer, BaseException):
                raise answer
            told = _number(answer, QUEUE_HEADER) / 1000
            self.queued_told += told if 0 <= told < math.inf else 0.0
            return answer

    def _is_queued(self, name: str) -> bool:
        left = max(min(LOOK_SECONDS, self._deadline - time.monotonic()), 1e-3)
        try:
            found = self._http.get(f"{self.url}{REQUESTS_PATH}/{name}", timeout=left)
            return bool(found.status_code == httpx.codes.OK and found.json().get("state") == QUEUED)
        except (httpx.HTTPError, ValueError, AttributeError):
            return False

    def _send(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], limit: httpx.Timeout
    ) -> httpx.Response:
        try:
            response = self._http.request(
                method, f"{self.url}{path}", content=content, headers=headers or None, timeout=limit
            )
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ConfigError(f"the teacher's address {self.url!r} is not http: {error}") from error
        except httpx.TransportError as error:
            raise TryAgainError(f"{type(error).__name__}: {error}") from error
        except httpx.RequestError as error:
            raise TropdError(f"the teacher at {self.url} gave an unusable answer: {error}") from error
        if response.status_code in PASSING:
            raise TryAgainError(reason(response), _number(response, "Retry-After"))
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise ServerFaultError(
                f"the teacher at {self.url} refused with 500: {reason(response)}",
                hint="see the service's log",
            )
        self.sent += len(content or b"")
        self.received += len(response.content)
        return response

    def accepted(self, response: httpx.Response) -> httpx.Response:
        """The response itself if its status is 200.

        Raises:
            TropdError: any other, with the server's reason.
        """
        if response.status_code != httpx.codes.OK:
            raise TropdError(
                f"the teacher at {self.url} refused with {response.status_code}: {reason(response)}",
                hint="see the service's log" if response.status_code >= 500 else None,
            )
        return response


def reason(response: httpx.Response) -> str:
    """Why a server refused, in our form (``error``), OpenAI's (``error.message``), or the beginning of the text."""
    try:
        error: Any = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase


def _number(response: httpx.Response, header: str) -> float:
    """A header's value; 0 without it, or if it is no number."""
    try:
        value = float(response.headers.get(header, 0))
    except ValueError:
        return 0.0
    return 0.0 if math.isnan(value) else value
