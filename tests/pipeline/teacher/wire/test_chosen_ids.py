"""Ids that the student chose, on the wire: requests without them are those of before; refusals name row and field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tropd.pipeline.objectives.partition_specs import AllTrusted, SampledPartition
from tropd.pipeline.teacher.wire.arrow_stream import list_column, number_column, write_stream
from tropd.pipeline.teacher.wire.messages import (
    ProtocolError,
    ScoredItem,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    log_tail,
)

V, C, N = 24, 3, 5


def items(count: int = 3, *, chosen: bool = True) -> list[ScoreItem]:
    random = np.random.default_rng(0)
    return [
        ScoreItem(
            random.integers(0, V, size=N + 1 + i).astype(np.int32),
            1,
            -random.random(N + i).astype(np.float32),
            i,
            np.array([random.permutation(V)[:C] for _ in range(N + i)], dtype=np.int32) if chosen else None,
        )
        for i in range(count)
    ]


def ask(*sequences: ScoreItem, **changes: Any) -> ScoreRequest:
    request = ScoreRequest(sequences, AllTrusted(), "none", 0, False, V, C, True)
    return replace(request, **changes)


def answer(request: ScoreRequest, **changes: Any) -> ScoreResponse:
    random = np.random.default_rng(1)
    none = np.zeros((0, 0), dtype=np.float32)
    found = []
    for item in request.sequences:
        n = len(item.student_logprobs)
        one = ScoredItem(
            -random.random(n).astype(np.float32),
            np.ones(n, dtype=np.bool_),
            None,
            np.zeros(0, dtype=np.int32),
            none.astype(np.int32),
            none,
            none.reshape(-1),
            -random.random((n, C)).astype(np.float32),
            -random.random(n).astype(np.float32),
            random.integers(0, C + 1, size=n).astype(np.float32) / C,
        )
        found.append(replace(one, **changes))
    return ScoreResponse(found, "w")


def decode(data: bytes, **options: Any) -> ScoreRequest:
    return decode_request(data, vocab_size=V, max_length=64, **options)


def test_ids_and_scores_arrive_as_they_were_sent() -> None:
    request = ask(*items())
    got = decode(encode_request(request), max_bytes=100_000)
    assert (got.chosen, got.overlap) == (C, True)
    for sent, one in zip(request.sequences, got.sequences, strict=True):
        assert np.array_equal(sent.chosen, one.chosen)
    response = answer(request)
    back = decode_response(encode_response(response, k=0, entropy=False, chosen=True), request)
    for said, heard in zip(response.items, back.items, strict=True):
        assert np.array_equal(said.chosen_logprobs, heard.chosen_logprobs)
        assert np.array_equal(said.chosen_tail, heard.chosen_tail)
        assert np.array_equal(said.chosen_overlap, heard.chosen_overlap)
    bare = replace(request, overlap=False)
    without = encode_response(answer(bare, chosen_overlap=None), k=0, entropy=False, chosen=True)
    assert all(item.chosen_overlap is None for item in decode_response(without, bare).items)


def test_without_chosen_ids_every_byte_is_that_of_version_1() -> None:
    """Written here by hand, as the first version did: what existing methods send and get per token has not changed."""
    request = ScoreRequest(items(chosen=False), SampledPartition(), "outliers", 2, False, V)
    floats, integers = pa.list_(pa.float32()), pa.list_(pa.int32())
    schema = pa.schema(
        [("tokens", integers), ("start", pa.int32()), ("student", floats), ("seed", pa.int64())]
    )
    columns = [
        list_column([i.tokens for i in request.sequences], pa.int32()),
        number_column([i.start for i in request.sequences], pa.int32()),
        list_column([i.student_logprobs for i in request.sequences], pa.float32()),
        number_column([i.seed for i in request.sequences], pa.int64()),
    ]
    options = '{"version":1,"partition":{"rule":"sampled"},"topk":"outliers","k":2,"entropy":false,"vocab_limit":24}'
    assert encode_request(request) == write_stream(columns, schema, options)

    top = np.log(np.array([[0.5, 0.2]], dtype=np.float32))
    scored = ScoredItem(
        np.full(N, -1.0, dtype=np.float32), np.arange(N) > 0, None,
        np.zeros(1, dtype=np.int32), np.array([[4, 7]], dtype=np.int32), top, log_tail(top),
    )  # fmt: skip
    schema = pa.schema(
        [("teacher", floats), ("trusted", pa.list_(pa.bool_())), ("entropy", floats), ("positions", integers),
         ("topk_ids", integers), ("topk_logprobs", floats), ("tail", floats)]
    )  # fmt: skip
    columns = [
        list_column([scored.teacher_logprobs], pa.float32()),
        list_column([scored.trusted], pa.bool_()),
        list_column([np.zeros(0)], pa.float32()),
        list_column([scored.topk_positions], pa.int32()),
        list_column([scored.topk_ids.reshape(-1)], pa.int32()),
        list_column([scored.topk_logprobs.reshape(-1)], pa.float32()),
        list_column([scored.tail], pa.float32()),
    ]
    options = '{"version":1,"k":2,"entropy":false,"teacher":"w"}'
    assert encode_response(ScoreResponse([scored], "w"), k=2, entropy=False) == write_stream(
        columns, schema, options
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1, 2]] * 4, "sequence 1: column 'chosen' has 12 ids for 5 scored tokens, of which each has 3"),
        ([[0, 1, 2]] * 6, "sequence 1: column 'chosen' has 18 ids"),
        ([[0, 1, 2]] * 4 + [[0, 1, V]], f"sequence 1: column 'chosen': id {V} at scored token 4 is outside 0 … 23"),
        ([[0, 1, 2], [-1, 1, 2]] + [[0, 1, 2]] * 3, "sequence 1: column 'chosen': id -1 at scored token 1 is outside"),
        ([[0, 1, 2]] * 2 + [[5, 7, 5]] + [[0, 1, 2]] * 2, "id 5 is there twice at scored token 2"),
    ],
)  # fmt: skip
def test_ids_that_are_none_are_refused_with_row_and_field(ids: list[list[int]], message: str) -> None:
    sound, broken = items()[:1], replace(items()[0], chosen=np.array(ids, dtype=np.int32))
    with pytest.raises(ProtocolError) as caught:
        decode(encode_request(ask(*sound, broken)))
    assert message in str(caught.value)
    assert caught.value.sequence == 1


def test_more_ids_than_allowed_are_refused() -> None:
    with pytest.raises(ProtocolError, match="option chosen: 3 ids per token, the teacher takes 2"):
        decode(encode_request(ask(*items())), max_chosen=2)
    with pytest.raises(ProtocolError, match="the teacher takes 0"):  # a teacher that gives none
        decode(encode_request(ask(*items())), max_chosen=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"chosen_logprobs": np.zeros((N, C + 1), dtype=np.float32)},
        {"chosen_logprobs": np.full((N, C), 0.1, dtype=np.float32)},
        {"chosen_tail": np.full(N, np.nan, dtype=np.float32)},
        {"chosen_tail": np.zeros(N - 1, dtype=np.float32)},
        {"chosen_overlap": np.full(N, 1.5, dtype=np.float32)},
        {"chosen_overlap": None},
    ],
)
def test_scores_that_are_none_are_refused_by_the_asker(changes: dict[str, Any]) -> None:
    request = ask(items()[0])
    data = encode_response(answer(request, **changes), k=0, entropy=False, chosen=True)
    with pytest.raises(ProtocolError, match="sequence 0"):
        decode_response(data, request)


def test_versions_are_not_mixed_up() -> None:
    request = ask(*items())
    with pytest.raises(ProtocolError, match="columns"):
        decode_response(encode_response(answer(request), k=0, entropy=False), request)
    old = ScoreRequest(items(chosen=False), AllTrusted(), "none", 0, False, V)
    with pytest.raises(ProtocolError, match="columns"):
        decode_response(encode_response(answer(request), k=0, entropy=False, chosen=True), old)
