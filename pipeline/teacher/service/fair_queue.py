"""A queue in which clients take turns, whoever sends more or faster; each client's own items stay in their order."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

Waiting = TypeVar("Waiting")


class FairQueue(Generic[Waiting]):
    """Any thread may put; one takes. A client that has just been served comes after all others that wait."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def has(self, client: str) -> bool:
        """True if something of this client waits."""
        with self._changed:
            return client in self._waiting

    def put(self, client: str, item: Waiting) -> None:
        """Append to the client's items."""
        with self._changed:
            self._waiting.setdefault(client, deque()).append(item)
            self._changed.notify()

    def close(self) -> None:
        """Nothing is put from now on: ``take`` gives what waits, and then None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> Waiting | None:
        """The next item, as soon as there is one; None if the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._next() if self._waiting else None

    def take_if(self, fits: Callable[[Waiting], bool]) -> Waiting | None:
        """The next item if it is there and fits; None leaves it where it is."""
        with self._changed:
            if not self._waiting or not fits(next(iter(self._waiting.values()))[0]):
                return None
            return self._next()

    def _next(self) -> Waiting:
        client, items = next(iter(self._waiting.items()))
        item = items.popleft()
        if items:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return item
