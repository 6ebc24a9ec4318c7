"""Clients of the service's queue take turns."""

from __future__ import annotations

import threading

from tropd.pipeline.teacher.service.fair_queue import FairQueue


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    queue.close()
    assert list(iter(queue.take, None)) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_has_just_been_served_does_not_get_in_before_those_that_wait() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a", "a1")
    queue.put("b", "b1")
    assert queue.take() == "a1"
    queue.put("a", "a2")
    queue.put("c", "c1")
    assert [queue.take() for _ in range(3)] == ["b1", "a2", "c1"]


def test_what_does_not_fit_stays_where_it_is() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put("a", 5)
    queue.put("b", 1)
    assert queue.take_if(lambda size: size < 3) is None
    assert queue.has("a")
    assert queue.take_if(lambda size: size == 5) == 5
    assert not queue.has("a")
    assert queue.take() == 1


def test_taking_waits_for_an_item_and_ends_with_the_queue() -> None:
    queue: FairQueue[int] = FairQueue()
    threading.Timer(0.1, queue.put, ("a", 1)).start()
    assert queue.take() == 1
    threading.Timer(0.1, queue.close).start()
    assert queue.take() is None
