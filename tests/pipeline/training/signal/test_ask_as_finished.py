"""Requests are made up before any row is written, and sent as soon as their rows are: whatever the order, the same."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tropd.pipeline.config.sections.training_settings import RolloutConfig
from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.teacher.wire.messages import ScoredItem
from tropd.pipeline.training.rollout.rows import Row, RowPlan, roll_out
from tropd.pipeline.training.signal.ask_as_finished import AskedAsFinished, PlannedRequest, plan_requests
from tropd.storage.errors import TropdError


def plan(seed: int, prompt: int = 2, **fields: Any) -> RowPlan:
    return RowPlan(seed, seed, [3] * prompt, [], None, False, seed, **fields)


def row(seed: int, tokens: int = 1) -> Row:
    return Row(plan(seed), [seed] * tokens, [-1.0] * tokens, False)


def requests(plans: Sequence[RowPlan], servers: int = 1, **options: Any) -> list[tuple[str, tuple[int, ...]]]:
    given = {"teacher_of": lambda row: "", "max_tokens": 8, "pass_tokens": 30, **options}
    made = plan_requests(plans, servers={"": servers, "math": 1}, **given)
    return [(one.teacher, one.rows) for one in made]


def answer(row: Row) -> ScoredItem:
    none = np.zeros(0, np.float32)
    ids = np.zeros((0, 1), np.int32)
    return ScoredItem(
        np.full(len(row.tokens), -row.plan.seed, np.float32), none > 0, None, none, ids, ids, none
    )


def asked(groups: Sequence[tuple[int, ...]], ask: Callable[[str, list[Row]], Any], servers: int = 1) -> Any:
    return AskedAsFinished([PlannedRequest("", group) for group in groups], {"": servers}, ask)


def test_a_request_has_the_rows_that_fill_a_pass_at_full_length() -> None:
    plans = [plan(seed) for seed in range(7)]
    assert requests(plans) == [("", (0, 1, 2)), ("", (3, 4, 5)), ("", (6,))]
    assert requests(plans, pass_tokens=1) == [("", (seed,)) for seed in range(7)]
    assert requests(plans, pass_tokens=10**6) == [("", tuple(range(7)))]
    # A teacher with a longer prompt of its own has room for fewer.
    longer = [plan(seed, teacher_tokens=[3] * 10) for seed in range(3)]
    assert requests(longer) == [("", (0,)), ("", (1,)), ("", (2,))]
    assert requests([]) == []


def test_every_server_gets_a_share_and_every_teacher_its_own_rows() -> None:
    plans = [plan(seed) for seed in range(4)]
    assert requests(plans, servers=2, pass_tokens=10**6) == [("", (0, 1)), ("", (2, 3))]
    found = requests(plans, teacher_of=lambda row: "math" if row.seed % 2 else "", pass_tokens=10**6)
    assert found == [("", (0, 2)), ("math", (1, 3))]


def test_the_first_request_arrives_while_the_last_row_is_still_written() -> None:
    arrived = threading.Event()
    seen: list[list[int]] = []

    class Writer:
        """Ends its rows one by one, the last first, and goes on when the teacher has been asked about that."""

        max_length = 100

        def generate(self, prompts: Any, sampling: Sampling, *, finished: Any, **options: Any) -> Any:
            written = [Generation([5] * (n + 1), [-1.0] * (n + 1), "stop") for n in range(len(prompts))]
            finished(2, written[2])
            assert arrived.wait(20)
            finished(1, written[1])
            assert seen == [[2]]
            return written

    def ask(teacher: str, rows: list[Row]) -> list[ScoredItem]:
        seen.append([one.plan.seed for one in rows])
        arrived.set()
        return [answer(one) for one in rows]

    plans = [plan(seed) for seed in range(3)]
    asking = asked([(0, 1), (2,)], ask)
    rows = roll_out(plans, Writer(), RolloutConfig(max_tokens=8), finished=asking.finished)
    assert [len(one.tokens) for one in rows] == [1, 2, 3]
    found = asking.answers()
    assert seen == [[2], [0, 1]]  # that which was complete first, and rows in their order
    assert {seed: len(one.teacher_logprobs) for seed, one in found.items()} == {0: 1, 1: 2, 2: 3}


def test_requests_and_answers_are_the_same_in_whatever_order_rows_end() -> None:
    for order in itertools.permutations(range(4)):
        seen: list[tuple[int, ...]] = []

        def ask(teacher: str, rows: list[Row], seen: list[tuple[int, ...]] = seen) -> list[ScoredItem]:
            seen.append(tuple(one.plan.seed for one in rows))
            return [answer(one) for one in rows]

        asking = asked([(0, 1), (2, 3)], ask)
        for seed in order:
            asking.finished(row(seed, tokens=0 if seed == 3 else 1))  # one without a token
        found = asking.answers()
        assert sorted(seen) == [(0, 1), (2,)]
        assert {seed: one.teacher_logprobs.tolist() for seed, one in found.items()} == {
            0: [0],
            1: [-1],
            2: [-2],
        }


def test_a_row_without_tokens_is_not_asked_about() -> None:
    asking = asked([(0,)], lambda teacher, rows: pytest.fail("asked"))
    asking.finished(row(0, tokens=0))
    assert asking.answers() == {}
    assert asked([], lambda teacher, rows: []).answers() == {}


def test_servers_work_at_the_same_time_one_request_each() -> None:
    both, most, under_way = threading.Barrier(2), [0], [0]
    lock = threading.Lock()

    def ask(teacher: str, rows: list[Row]) -> list[ScoredItem]:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        both.wait(20)
        with lock:
            under_way[0] -= 1
        return [answer(one) for one in rows]

    asking = asked([(seed,) for seed in range(6)], ask, servers=2)
    for seed in range(6):
        asking.finished(row(seed))
    assert sorted(asking.answers()) == list(range(6))
    assert most == [2]


def test_an_error_is_raised_where_the_answers_are_taken_and_nothing_is_asked_after_it() -> None:
    seen = []

    def ask(teacher: str, rows: list[Row]) -> list[ScoredItem]:
        seen.append(rows[0].plan.seed)
        raise TropdError("the teacher gave no answer", hint="start it again")

    asking = asked([(0,), (1,)], ask)
    for seed in range(2):
        asking.finished(row(seed))
    with pytest.raises(TropdError, match="gave no answer") as failed:
        asking.answers()
    assert (failed.value.hint, seen) == ("start it again", [0])


def test_what_is_given_up_is_not_asked_about() -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def ask(teacher: str, rows: list[Row]) -> list[ScoredItem]:
        seen.append(rows[0].plan.seed)
        begun.set()
        assert go_on.wait(20)
        return [answer(one) for one in rows]

    before = set(threading.enumerate())
    asking = asked([(0,), (1,)], ask)
    (sender,) = set(threading.enumerate()) - before
    asking.finished(row(0))
    assert begun.wait(20)
    asking.finished(row(1))
    asking.give_up()
    go_on.set()
    sender.join(20)
    assert not sender.is_alive()
    assert seen == [0]
