"""Merging: every request gets its own answer, whoever shares its batch, and nothing is left waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tropd.pipeline.objectives.partition_specs import (
    AllTrusted,
    ExpectedPartition,
    NoneTrusted,
    Partition,
    RatioPartition,
    SampledPartition,
    SignPartition,
    TeacherEntropyPartition,
)
from tropd.pipeline.teacher.service.batcher import Batcher, TeacherOutputError, outlier_mask, score_requests
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest
from tropd.storage.seeds import uniforms

V = 24
NAN, FAILS = 22, 23


def item(tokens: list[int], start: int = 1, seed: int = 5) -> ScoreItem:
    n = len(tokens) - start
    return ScoreItem(np.array(tokens, dtype=np.int32), start, np.full(n, -2.0, dtype=np.float32), seed)


def ask(*items: ScoreItem, partition: Partition | None = None, topk: Any = "outliers") -> ScoreRequest:
    partition = partition or SampledPartition()
    return ScoreRequest(items, partition, topk, 3, partition.rule == "teacher_entropy", V)


def random_items(count: int, seed: int = 0) -> list[ScoreItem]:
    generator = np.random.default_rng(seed)
    items = []
    for i in range(count):
        tokens = generator.integers(0, NAN, size=int(generator.integers(2, 30))).tolist()
        items.append(item(tokens, int(generator.integers(1, len(tokens))), seed=i))
    return items


def test_each_request_of_a_merged_batch_gets_its_own_answer(table_engine: Any) -> None:
    items = random_items(30)
    requests = [ask(*items[:4]), ask(), ask(*items[4:5]), ask(*items[5:])]
    merged = score_requests(table_engine, requests)
    assert [len(answer.items) for answer in merged] == [4, 0, 1, 25]
    for request, together in zip(requests, merged, strict=True):
        (alone,) = score_requests(table_engine, [request])
        for asked, one, other in zip(request.sequences, together.items, alone.items, strict=True):
            expected = table_engine.expected(asked.tokens.tolist(), asked.start)
            assert np.array_equal(one.teacher_logprobs, expected)
            assert np.array_equal(one.trusted, other.trusted)
            assert np.array_equal(one.topk_ids, other.topk_ids)


@pytest.mark.parametrize(
    "partition",
    [
        AllTrusted(),
        NoneTrusted(),
        SampledPartition(),
        ExpectedPartition(),
        RatioPartition(threshold=0.7),
        SignPartition(),
        TeacherEntropyPartition(threshold=1.5),
    ],
    ids=lambda partition: partition.rule,
)
def test_alternatives_are_exactly_where_the_asker_sees_outliers(
    table_engine: Any, partition: Partition
) -> None:
    request = ask(*random_items(20), partition=partition)
    (answer,) = score_requests(table_engine, [request])
    for asked, got in zip(request.sequences, answer.items, strict=True):
        outlier = outlier_mask(request, asked, got.teacher_logprobs, got.entropy)
        assert np.array_equal(got.trusted, ~outlier)
        assert np.array_equal(got.topk_positions, np.flatnonzero(outlier))
        assert got.topk_ids.shape == got.topk_logprobs.shape == (outlier.sum(), 3)
        rows = table_engine.table[asked.tokens[asked.start - 1 : -1][outlier]]
        assert np.array_equal(got.topk_ids, np.argsort(-rows, axis=1)[:, :3])
        rest = 1.0 - np.exp(got.topk_logprobs.astype(np.float64)).sum(1)
        assert np.allclose(np.exp(got.tail), rest, atol=1e-6)
    for topk, count in (("none", 0), ("all", 1)):
        (answer,) = score_requests(table_engine, [replace(request, topk=topk)])
        for asked, got in zip(request.sequences, answer.items, strict=True):
            assert len(got.topk_positions) == count * len(asked.student_logprobs)


def test_the_sampled_rule_draws_by_seed_and_place_in_the_sequence(table_engine: Any) -> None:
    tokens = [3, 9, 4, 11, 2, 7, 5, 1, 8]
    (answer,) = score_requests(table_engine, [ask(item(tokens, start=4, seed=99))])
    (got,) = answer.items
    chance = np.exp(np.minimum(got.teacher_logprobs.astype(np.float64) + 2.0, 0.0))
    drawn = [
        float(uniforms(99, place)) for place in range(4, 9)
    ]  # the index in the sequence, not in the span
    assert got.trusted.tolist() == [u <= p for u, p in zip(drawn, chance, strict=True)]


@pytest.mark.parametrize("culprit", [NAN, FAILS])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_culprit_spoils_only_its_own_request(table_engine: Any, culprit: int, place: int) -> None:
    batcher = Batcher(table_engine, batch_tokens=1000, queue_tokens=10_000)
    table_engine.gate.clear()
    first = batcher.submit(ask(item([2, 3])))
    assert table_engine.entered.wait(10)
    tokens = [[2, 3, i] for i in range(5)]
    tokens[place][1] = culprit
    futures = [batcher.submit(ask(item(t), item([4, 5]))) for t in tokens]
    table_engine.gate.set()
    assert first.result(10)
    for i, future in enumerate(futures):
        if i == place:
            with pytest.raises(TeacherOutputError if culprit == NAN else RuntimeError):
                future.result(10)
        else:
            assert np.array_equal(
                future.result(10).items[0].teacher_logprobs, table_engine.expected(tokens[i], 1)
            )
    assert [len(call) for call in table_engine.calls] == [1, 10, 2, 2, 2, 2, 2]  # merged, then one by one
    batcher.close()
    assert batcher.waiting_tokens == 0


def test_a_request_that_is_to_be_alone_is_not_merged_whoever_waits(table_engine: Any) -> None:
    batcher = Batcher(table_engine, batch_tokens=1000, queue_tokens=10_000)
    table_engine.gate.clear()
    futures = [batcher.submit(ask(item([2, 3])))]
    assert table_engine.entered.wait(10)
    for number, alone in enumerate((True, True, False, True, False, False)):
        futures.append(batcher.submit(ask(item([2, number])), client=f"c{number}", alone=alone))
    table_engine.gate.set()
    for future in futures:
        future.result(10)
    calls = [[tokens[1] for tokens in call] for call in table_engine.calls[1:]]
    assert calls == [[0], [1], [2], [3], [4, 5]]
    batcher.close()


def test_batches_stay_within_the_budget_and_in_order(table_engine: Any) -> None:
    batcher = Batcher(table_engine, batch_tokens=10, queue_tokens=10_000)
    table_engine.gate.clear()
    futures = [batcher.submit(ask(item([2, 3])))]
    assert table_engine.entered.wait(10)
    lengths = [4, 4, 4, 9, 2, 30, 5, 5, 1 + 1]
    futures += [batcher.submit(ask(item([i] * n))) for i, n in enumerate(lengths)]
    table_engine.gate.set()
    for future in futures:
        future.result(10)
    assert [[len(t) for t in call] for call in table_engine.calls[1:]] == [
        [4, 4],
        [4],
        [9],
        [2],
        [30],
        [5, 5],
        [2],
    ]
    batcher.close()


def test_closing_answers_what_is_queued(table_engine: Any) -> None:
    batcher = Batcher(table_engine, batch_tokens=8, queue_tokens=10_000)
    table_engine.gate.clear()
    futures = [
        batcher.submit(ask(item([i, 3, 4]), partition=RatioPartition() if i % 3 else None)) for i in range(12)
    ]
    table_engine.gate.set()
    batcher.close()
    assert all(future.done() for future in futures)
    for i, future in enumerate(futures):
        assert np.array_equal(future.result().items[0].teacher_logprobs, table_engine.expected([i, 3, 4], 1))
    assert batcher.waiting_tokens == 0


def test_who_gave_up_is_not_scored_and_frees_the_queue(table_engine: Any) -> None:
    batcher = Batcher(table_engine, batch_tokens=1, queue_tokens=10_000)
    table_engine.gate.clear()
    first = batcher.submit(ask(item([2, 3])))
    assert table_engine.entered.wait(10)
    gone, stays = batcher.submit(ask(item([5, 6]))), batcher.submit(ask(item([7, 8])))
    assert gone.cancel()
    table_engine.gate.set()
    assert first.result(10)
    assert stays.result(10)
    batcher.close()
    assert table_engine.calls == [[[2, 3]], [[7, 8]]]
    assert batcher.waiting_tokens == 0


def test_tokens_without_probability_are_outliers_with_whatever_else_there_is(table_engine: Any) -> None:
    table_engine.table[3, 4] = -np.inf
    (answer,) = score_requests(table_engine, [ask(item([3, 4, 5]))])
    assert np.isneginf(answer.items[0].teacher_logprobs[0])
    assert not answer.items[0].trusted[0]


@pytest.mark.parametrize("value", [0.1, np.inf])
def test_log_probs_that_cannot_be_are_never_passed_on(table_engine: Any, value: float) -> None:
    table_engine.table[3, 4] = value
    with pytest.raises(TeacherOutputError):
        score_requests(table_engine, [ask(item([3, 4, 5]))])
    with pytest.raises(TeacherOutputError):  # among the alternatives
        score_requests(table_engine, [ask(item([3, 5]), topk="all")])


def test_rounding_above_zero_counts_as_certain(table_engine: Any) -> None:
    table_engine.table[3, 4] = 1e-6
    (answer,) = score_requests(table_engine, [ask(item([3, 4]), topk="all")])
    assert answer.items[0].teacher_logprobs[0] == answer.items[0].topk_logprobs[0, 0] == 0.0
