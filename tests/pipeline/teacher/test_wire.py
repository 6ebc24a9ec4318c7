"""The wire format: round trips, and that hostile bytes raise ``ProtocolError`` and nothing else."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.objectives.partition_specs import RatioPartition, SampledPartition
from tropd.pipeline.teacher.wire.arrow_stream import column_arrays, list_column, number_column
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

V = 24
LIMITS = {"vocab_size": V, "max_length": 64}


def item(tokens: list[int], start: int, seed: int = 0) -> ScoreItem:
    n = len(tokens) - start
    return ScoreItem(np.array(tokens, dtype=np.int32), start, np.full(n, -1.5, dtype=np.float32), seed)


def request(items: list[ScoreItem], k: int = 3) -> ScoreRequest:
    return ScoreRequest(items, SampledPartition(), "outliers", k, False, V)


def response(asked: ScoreRequest, k: int = 3) -> ScoreResponse:
    items = []
    for one in asked.sequences:
        n = len(one.student_logprobs)
        positions = np.arange(0, n, 2, dtype=np.int32)
        logprobs = np.tile(np.log(np.array([0.5, 0.2, 0.1], dtype=np.float32)), (len(positions), 1))
        ids = np.tile(np.arange(3, dtype=np.int32), (len(positions), 1))
        trusted = np.ones(n, dtype=np.bool_)
        trusted[positions] = False
        teacher = np.full(n, -2.0, dtype=np.float32)
        items.append(ScoredItem(teacher, trusted, None, positions, ids, logprobs, log_tail(logprobs)))
    return ScoreResponse(items)


sequences = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, V - 1), min_size=n, max_size=n),
            st.integers(1, n - 1),
            st.integers(0, 2**63 - 1),
        )
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(sequences)
def test_requests_and_answers_survive_the_wire(rows: list[tuple[list[int], int, int]]) -> None:
    asked = request([item(tokens, start, seed) for tokens, start, seed in rows])
    got = decode_request(encode_request(asked), **LIMITS)
    assert (got.partition, got.topk, got.k, got.entropy, got.vocab_limit) == (
        SampledPartition(),
        "outliers",
        3,
        False,
        V,
    )
    for mine, theirs in zip(asked.sequences, got.sequences, strict=True):
        assert np.array_equal(mine.tokens, theirs.tokens)
        assert (mine.start, mine.seed) == (theirs.start, theirs.seed)
        assert np.array_equal(mine.student_logprobs, theirs.student_logprobs)
    answer = response(asked)
    back = decode_response(encode_response(answer, k=3, entropy=False), asked)
    for mine, theirs in zip(answer.items, back.items, strict=True):
        for name in ("teacher_logprobs", "trusted", "topk_positions", "topk_ids", "topk_logprobs", "tail"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (item([2, 99], 1), "token id"),
        (item([-1, 2], 1), "token id"),
        (item([2, 3], 2), "leaves no token"),
        (item([2, 3], 0), "leaves no token"),
        (item([2] * 65, 1), "65 tokens"),
        (
            ScoreItem(np.array([1, 2, 3], dtype=np.int32), 1, np.array([-1.0], dtype=np.float32), 0),
            "1 student",
        ),
        (ScoreItem(np.array([1, 2], dtype=np.int32), 1, np.array([np.nan], dtype=np.float32), 0), "NaN"),
        (
            ScoreItem(np.array([1, 2], dtype=np.int32), 1, np.array([-np.inf], dtype=np.float32), 0),
            "infinite",
        ),
        (ScoreItem(np.array([1, 2], dtype=np.int32), 1, np.array([0.5], dtype=np.float32), 0), "positive"),
        (item([2, 3], 1, seed=-1), "seed"),
    ],
)
def test_a_bad_sequence_is_named(bad: ScoreItem, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        decode_request(encode_request(request([item([2, 3], 1), bad])), **LIMITS)
    assert caught.value.sequence == 1


def test_truncation_at_every_byte_is_an_error() -> None:
    data = encode_request(request([item([2, 3, 4, 5], 1), item([7, 8], 1)]))
    for length in range(0, len(data) - 8, 3):  # the end-of-stream mark may be missing
        with pytest.raises(ProtocolError):
            decode_request(data[:length], **LIMITS)


def test_noise_and_flipped_bits_never_raise_anything_else() -> None:
    generator = np.random.default_rng(0)
    asked = request([item([2, 3, 4, 5], 1), item([7, 8, 9], 2)])
    good, answer = encode_request(asked), encode_response(response(asked), k=3, entropy=False)
    for trial in range(600):
        for data, decode in (
            (good, lambda d: decode_request(d, **LIMITS)),
            (answer, lambda d: decode_response(d, asked)),
        ):
            broken = bytearray(data)
            for place in generator.integers(len(broken), size=1 + trial % 4):
                broken[place] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(ProtocolError):
                decode(bytes(broken))
    for size in (0, 1, 8, 100, 4000):
        with pytest.raises(ProtocolError):
            decode_request(generator.bytes(size), **LIMITS)


def test_other_columns_types_versions_and_nulls_are_refused() -> None:
    def stream(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    good = encode_request(request([item([2, 3], 1)]))
    table = pa.ipc.open_stream(good).read_all()
    metadata = dict(table.schema.metadata)
    with pytest.raises(ProtocolError, match="columns"):
        decode_request(stream(table.drop_columns(["seed"])), **LIMITS)
    with pytest.raises(ProtocolError, match="columns"):
        decode_request(stream(table.set_column(1, "start", table["start"].cast(pa.float64()))), **LIMITS)
    with pytest.raises(ProtocolError, match="no options"):
        decode_request(stream(table.replace_schema_metadata(None)), **LIMITS)
    other = {k: v.replace(b'"version":1', b'"version":9') for k, v in metadata.items()}
    with pytest.raises(ProtocolError, match="version 9"):
        decode_request(stream(table.replace_schema_metadata(other)), **LIMITS)
    odd = {k: v.replace(b'"sampled"', b'"magic"') for k, v in metadata.items()}
    with pytest.raises(ProtocolError, match="option partition"):
        decode_request(stream(table.replace_schema_metadata(odd)), **LIMITS)
    null = table.set_column(0, "tokens", pa.array([[2, None]], pa.list_(pa.int32())))
    with pytest.raises(ProtocolError, match="null"):
        decode_request(stream(null), **LIMITS)
    missing = table.set_column(1, "start", pa.array([None], pa.int32()))
    with pytest.raises(ProtocolError, match="null"):
        decode_request(stream(missing), **LIMITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_logprobs": np.zeros(1, dtype=np.float32)}, "does not have"),
        ({"teacher_logprobs": np.array([np.nan, 0, 0], dtype=np.float32)}, "NaN"),
        ({"teacher_logprobs": np.array([0.1, 0, 0], dtype=np.float32)}, "positive"),
        ({"topk_positions": np.array([0, 7], dtype=np.int32)}, "positions"),
        ({"topk_positions": np.array([2, 0], dtype=np.int32)}, "positions"),
        ({"topk_ids": np.full((2, 3), V, dtype=np.int32)}, "outside"),
        ({"tail": np.zeros(1, dtype=np.float32)}, "does not have"),
    ],
)
def test_unusable_answers_are_refused(change: dict[str, np.ndarray], words: str) -> None:
    asked = request([item([2, 3, 4, 5], 1)])
    (good,) = response(asked).items
    bad = ScoredItem(**{**vars(good), **change})
    with pytest.raises(ProtocolError, match=words):
        decode_response(encode_response(ScoreResponse([bad]), k=3, entropy=False), asked)
    with pytest.raises(ProtocolError, match="1 sequences for 2"):
        decode_response(
            encode_response(ScoreResponse([good]), k=3, entropy=False),
            request([*asked.sequences, item([2, 3], 1)]),
        )


def test_the_tail_is_the_rest_of_the_mass() -> None:
    logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.5]], dtype=np.float32))
    assert log_tail(logprobs)[0] == pytest.approx(np.log(0.25))
    assert log_tail(logprobs)[1] < -15  # nothing but the rounding of the log-probs


def test_a_trusted_token_costs_five_bytes_and_an_outlier_only_its_alternatives() -> None:
    rows = [item([int(x) for x in np.random.default_rng(i).integers(2, V, 40)], 8) for i in range(64)]
    asked = ScoreRequest(rows, RatioPartition(), "none", 0, False, V)
    generator = np.random.default_rng(1)
    items = [
        ScoredItem(
            -generator.random(32, dtype=np.float32),
            np.ones(32, dtype=np.bool_),
            None,
            np.zeros(0, dtype=np.int32),
            np.zeros((0, 0), dtype=np.int32),
            np.zeros((0, 0), dtype=np.float32),
            np.zeros(0, dtype=np.float32),
        )
        for _ in rows
    ]
    size = len(encode_response(ScoreResponse(items), k=0, entropy=False))
    assert size / (64 * 32) < 5.5
    assert decode_response(encode_response(ScoreResponse(items), k=0, entropy=False), asked)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int32(), [1, -2, 2**31 - 1]),
        (pa.float32(), [0.5, float("-inf"), -1e30]),
        (pa.bool_(), [True, False, True, True, False, False, False, True, True]),
        (pa.int32(), []),
        (pa.bool_(), []),
    ],
)
def test_columns_are_those_that_arrow_makes(kind: pa.DataType, values: list[Any]) -> None:
    rows = [np.array(values, kind.to_pandas_dtype()), np.array([], kind.to_pandas_dtype())] * 2
    column = list_column(rows, kind)
    assert column.equals(pa.array([values, []] * 2, pa.list_(kind)))
    column.validate(full=True)
    batch = pa.record_batch([column], names=["x"])
    for first in range(4):  # slices keep the buffers, and begin further on
        found = column_arrays(batch.slice(first), "x")
        assert [row.tolist() for row in found] == batch.slice(first).column(0).to_pylist()


def test_a_column_of_no_rows_need_not_have_offsets() -> None:
    child = pa.array([], pa.int32())
    column = pa.Array.from_buffers(pa.list_(pa.int32()), 0, [None, pa.py_buffer(b"")], children=[child])
    assert column_arrays(pa.record_batch([column], names=["x"]), "x") == []


def test_numbers_that_do_not_fit_are_not_bent() -> None:
    with pytest.raises(OverflowError, match="int32"):
        number_column(np.array([2**31]), pa.int32())
    with pytest.raises(OverflowError):
        number_column([2**63], pa.int64())


def test_neither_side_imports_pandas() -> None:
    """Arrow's converters would, if it is there; it takes as long as ten steps of a small model."""
    code = """
import sys
import numpy as np
from tropd.pipeline.objectives.partition_specs import SampledPartition
from tropd.pipeline.teacher.wire.messages import *
ones = np.full(2, -1.0, dtype=np.float32)
asked = ScoreRequest([ScoreItem(np.array([1, 2, 3], dtype=np.int32), 1, ones, 0)], SampledPartition(), "all", 1, False, 9)
got = decode_request(encode_request(asked), vocab_size=9, max_length=9)
best = np.full((2, 1), -0.5, dtype=np.float32)
answer = ScoredItem(ones, ones > 0, None, np.arange(2, dtype=np.int32), np.ones((2, 1), np.int32), best, log_tail(best))
decode_response(encode_response(ScoreResponse([answer]), k=1, entropy=False), asked)
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
