"""Damaged messages of every kind: ``ProtocolError`` with a short reason, and never another exception."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tropd.pipeline.objectives.partition_specs import AllTrusted, SampledPartition
from tropd.pipeline.teacher.wire import arrow_stream
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

V, MAX_LENGTH = 24, 64
MAX_BYTES = 100_000


def item(tokens: list[int], start: int = 1, **changes: Any) -> ScoreItem:
    n = max(len(tokens) - start, 0)
    sound = ScoreItem(np.array(tokens, dtype=np.int32), start, np.full(n, -1.5, dtype=np.float32), 7)
    return replace(sound, **changes)


ASKED = ScoreRequest([item([2, 3, 4, 5]), item([7, 8, 9], 2)], SampledPartition(), "outliers", 3, False, V)


def scored(n: int, **changes: Any) -> ScoredItem:
    logprobs = np.log(np.array([[0.5, 0.2, 0.1]], dtype=np.float32))
    sound = ScoredItem(
        teacher_logprobs=np.full(n, -2.0, dtype=np.float32),
        trusted=np.arange(n) > 0,
        entropy=None,
        topk_positions=np.zeros(1, dtype=np.int32),
        topk_ids=np.arange(3, dtype=np.int32)[None],
        topk_logprobs=logprobs,
        tail=log_tail(logprobs),
    )
    return replace(sound, **changes)


GOOD_REQUEST = encode_request(ASKED)
GOOD_ANSWER = encode_response(ScoreResponse([scored(3), scored(1)], "w"), k=3, entropy=False)


def decode(data: bytes) -> ScoreRequest:
    return decode_request(data, vocab_size=V, max_length=MAX_LENGTH, max_bytes=MAX_BYTES)


def decode_answer(data: bytes) -> ScoreResponse:
    return decode_response(data, ASKED)


def rewritten(
    data: bytes,
    *,
    schema: Callable[[pa.Schema], pa.Schema] = lambda schema: schema,
    column: tuple[str, pa.Array] | None = None,
    compression: str | None = None,
) -> bytes:
    """A stream with another schema or column, by Arrow's own writer."""
    table = pa.ipc.open_stream(data).read_all()
    if column is not None:
        name, values = column
        table = table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)
    table = table.replace_schema_metadata(schema(table.schema).metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def with_options(data: bytes, options: bytes) -> bytes:
    return rewritten(data, schema=lambda schema: schema.with_metadata({b"tropd.options": options}))


@pytest.mark.parametrize(("good", "read"), [(GOOD_REQUEST, decode), (GOOD_ANSWER, decode_answer)])
def test_a_message_cut_at_any_byte_is_refused(good: bytes, read: Callable[[bytes], Any]) -> None:
    assert read(good)
    end = len(good) - 8  # the mark of the stream's end may be missing
    for length in range(end):
        with pytest.raises(ProtocolError):
            read(good[:length])


@pytest.mark.parametrize(
    ("good", "read"),
    [
        (GOOD_REQUEST, decode),
        (GOOD_ANSWER, decode_answer),
        (rewritten(GOOD_REQUEST), decode),  # not compressed: damage reaches offsets and values
        (rewritten(GOOD_ANSWER), decode_answer),
    ],
    ids=["request", "answer", "plain-request", "plain-answer"],
)
def test_damage_raises_nothing_but_protocol_errors(good: bytes, read: Callable[[bytes], Any]) -> None:
    generator = np.random.default_rng(len(good))
    reasons = []
    for trial in range(1200):
        broken = bytearray(good)
        kind = trial % 5
        place = int(generator.integers(len(broken)))
        if kind < 2:  # flipped bits
            for at in generator.integers(len(broken), size=1 + trial % 4):
                broken[at] ^= 1 << int(generator.integers(8))
        elif kind == 2:  # a huge or negative length anywhere
            value = [2**31 - 1, 2**62, -1, -(2**63), 2**40][trial // 5 % 5]
            aligned = min(place & ~7, len(broken) - 8)
            broken[aligned : aligned + 8] = struct.pack("<q", value)
        elif kind == 3:  # noise within
            broken[place : place + 16] = generator.bytes(16)
        else:  # a piece left out or repeated
            size = int(generator.integers(1, 64))
            broken[place:place] = broken[place : place + size] if trial % 2 else b""
            del broken[place + size : place + 2 * size]
        try:
            read(bytes(broken))
        except ProtocolError as error:
            reasons.append(str(error))
    assert len(reasons) > 300
    assert 0 < min(map(len, reasons)) <= max(map(len, reasons)) < 600


def test_noise_is_refused() -> None:
    generator = np.random.default_rng(0)
    for size in [0, 1, 4, 7, 8, 9, *generator.integers(10, 3000, size=300).tolist()]:
        for start in (b"", GOOD_REQUEST[:8], b"\xff\xff\xff\xff"):
            data = start + generator.bytes(size)
            for read in (decode, decode_answer):
                with pytest.raises(ProtocolError):
                    read(data)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (item([2, V]), "token id"),
        (item([2, 2**31 - 1]), "token id"),
        (item([-1, 2]), "token id"),
        (item([2, -(2**31)]), "token id"),
        (item([2, 3], 2), "leaves no token"),
        (item([2, 3], 0), "leaves no token"),
        (item([2, 3], -1, student_logprobs=np.full(1, -1.0, dtype=np.float32)), "leaves no token"),
        (item([2, 3], 2**31 - 1), "leaves no token"),
        (item([]), "leaves no token"),
        (item([2] * (MAX_LENGTH + 1)), "65 tokens"),
        (item([2, 3], student_logprobs=np.zeros(0, dtype=np.float32)), "0 student"),
        (item([2, 3], student_logprobs=np.zeros(2, dtype=np.float32)), "2 student"),
        *(
            (item([2, 3], student_logprobs=np.array([value], dtype=np.float32)), "NaN, infinite or positive")
            for value in (np.nan, np.inf, -np.inf, 0.01)
        ),
        (item([2, 3], seed=-1), "seed"),
        (item([2, 3], seed=-(2**63)), "seed"),
    ],
)
def test_the_sequence_at_fault_is_numbered(bad: ScoreItem, words: str) -> None:
    request = replace(ASKED, sequences=[*ASKED.sequences, bad])
    with pytest.raises(ProtocolError, match=f"sequence 2: .*{words}") as caught:
        decode(encode_request(request))
    assert caught.value.sequence == 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens", pa.array([[2, 3, 4, 5], [7, 8, 9]], pa.list_(pa.int64()))),
        ("tokens", pa.array([[2, 3, 4, 5], [7, 8, 9]], pa.large_list(pa.int32()))),
        ("tokens", pa.array(["abc", "de"])),
        ("tokens", pa.array([[2, 3], [7, 8]], pa.list_(pa.int32(), 2))),
        ("tokens", pa.array(["a", "b"]).dictionary_encode()),
        ("start", pa.array([1.0, 2.0])),
        ("start", pa.array([1, 2], pa.uint32())),
        ("student", pa.array([[-1.0] * 3, [-1.0]], pa.list_(pa.float64()))),
        ("seed", pa.array([1, 2], pa.uint64())),
        ("seed", pa.nulls(2)),
    ],
)
def test_columns_of_another_type_are_refused(name: str, values: pa.Array) -> None:
    with pytest.raises(ProtocolError, match="the columns are"):
        decode(rewritten(GOOD_REQUEST, column=(name, values)))


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens", pa.array([[2, 3, 4, 5], None], pa.list_(pa.int32()))),
        ("tokens", pa.array([[2, 3, 4, None], [7, 8, 9]], pa.list_(pa.int32()))),
        ("student", pa.array([[-1.0, None, -1.0], [-1.0]], pa.list_(pa.float32()))),
        ("start", pa.array([1, None], pa.int32())),
        ("seed", pa.array([None, None], pa.int64())),
    ],
)
def test_nulls_are_refused(name: str, values: pa.Array, compression: str | None) -> None:
    with pytest.raises(ProtocolError, match="null"):
        decode(rewritten(GOOD_REQUEST, column=(name, values), compression=compression))


@pytest.mark.parametrize(
    "options",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version":' + b"9" * 5000 + b"}",
        b'{"version":0}',
        b'{"version":2}',
        b'{"version":"1"}',
        b'{"version":true}',
        b'{"version":1.0}',
        b'{"version":[1]}',
        b'{"version":"' + b"x" * 100_000 + b'"}',
        b'{"version":"\\ud800"}',
        b'{"version":1}',
        b'{"version":1,"' + b"y" * 100_000 + b'":1}',
    ],
    ids=range(18),
)
def test_options_that_make_no_sense_are_refused_briefly(options: bytes) -> None:
    for data, read in ((GOOD_REQUEST, decode), (GOOD_ANSWER, decode_answer)):
        with pytest.raises(ProtocolError) as caught:
            read(with_options(data, options))
        assert len(str(caught.value)) < 600  # what the sender wrote is not sent back at length
        str(caught.value).encode()  # it goes into a JSON answer


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"k":3', b'"k":-1'),
        (b'"k":3', b'"k":3.5'),
        (b'"k":3', b'"k":"3"'),
        (b'"k":3', b'"k":' + b"9" * 40),
        (b'"entropy":false', b'"entropy":0'),
        (b'"topk":"outliers"', b'"topk":"some"'),
        (b'"vocab_limit":24', b'"vocab_limit":0'),
        (b'"rule":"sampled"', b'"rule":"ratio","threshold":NaN'),
        (b'"rule":"sampled"', b'"rule":"ratio","threshold":2'),
        (b'"rule":"sampled"', b'"rule":"sampled","threshold":1'),
    ],
)
def test_options_out_of_range_are_refused(old: bytes, new: bytes) -> None:
    options = pa.ipc.open_stream(GOOD_REQUEST).schema.metadata[b"tropd.options"]
    assert old in options
    with pytest.raises(ProtocolError):
        decode(with_options(GOOD_REQUEST, options.replace(old, new)))


def test_compression_that_only_old_metadata_declare_does_not_get_around_the_limit() -> None:
    table = pa.ipc.open_stream(encode_request(replace(ASKED, sequences=[item([2] * 1_000_000)]))).read_all()
    old = pa.ipc.IpcWriteOptions(compression="zstd", metadata_version=pa.ipc.MetadataVersion.V4)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=old) as writer:
        writer.write_batch(table.to_batches()[0], custom_metadata={"ARROW:experimental_compression": "zstd"})
    bomb = bytearray(sink.getvalue().to_pybytes())
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(bytes(bomb)))
    messages.read_next_message()
    metadata = messages.read_next_message().metadata.to_pybytes()
    # Take the field that declares the compression out of the record batch's table.
    header = arrow_stream.required(
        arrow_stream.field(memoryview(metadata), arrow_stream.follow_offset(memoryview(metadata), 0), 2)
    )
    batch = arrow_stream.follow_offset(memoryview(metadata), header)
    vtable = batch - struct.unpack_from("<i", metadata, batch)[0]
    struct.pack_into("<H", bomb, bytes(bomb).index(metadata) + vtable + 4 + 2 * 3, 0)
    assert len(pa.ipc.open_stream(bytes(bomb)).read_all()["tokens"][0]) == 1_000_000  # Arrow unfolds it
    before = pa.total_allocated_bytes()
    with pytest.raises(ProtocolError):
        decode_request(bytes(bomb), vocab_size=V, max_length=10**9, max_bytes=MAX_BYTES)
    assert pa.total_allocated_bytes() - before < MAX_BYTES


def test_an_answer_that_unfolds_beyond_what_was_asked_is_refused() -> None:
    flood = replace(scored(1), teacher_logprobs=np.full(1_000_000, -1, dtype=np.float32))
    data = encode_response(ScoreResponse([flood, scored(1)], "w"), k=3, entropy=False)
    assert len(data) < MAX_BYTES
    with pytest.raises(ProtocolError, match="when decompressed"):
        decode_answer(data)


@pytest.mark.parametrize("k", [1, 64, 1024])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (500, 1), (1, 3000), (64, 32)])
def test_the_largest_sound_answer_is_taken(k: int, rows: int, n: int) -> None:
    asked = ScoreRequest([item([2] * (n + 1))] * rows, AllTrusted(), "all", k, True, 2048)
    logprobs = np.full((n, k), -np.log(2048.0), dtype=np.float32)
    full = ScoredItem(
        teacher_logprobs=np.full(n, -2.0, dtype=np.float32),
        trusted=np.ones(n, dtype=np.bool_),
        entropy=np.ones(n, dtype=np.float32),
        topk_positions=np.arange(n, dtype=np.int32),
        topk_ids=np.tile(np.arange(k, dtype=np.int32), (n, 1)),
        topk_logprobs=logprobs,
        tail=log_tail(logprobs),
    )
    data = encode_response(ScoreResponse([full] * rows, "w"), k=k, entropy=True)
    assert len(decode_response(data, asked).items) == rows


def test_a_request_of_no_sequences_is_sound() -> None:
    nothing = replace(ASKED, sequences=[])
    assert decode(encode_request(nothing)).sequences == []
    for k in (0, 3):
        empty = encode_response(ScoreResponse([], "w"), k=k, entropy=False)
        assert decode_response(empty, nothing).items == []


@pytest.mark.parametrize(
    "change",
    [
        *({"teacher_logprobs": np.array([-1, x, -1], dtype=np.float32)} for x in (np.nan, np.inf, 1e-6)),
        *({"topk_logprobs": np.array([[x, -2, -3]], dtype=np.float32)} for x in (np.nan, np.inf, 1e-6)),
        *({"tail": np.array([x], dtype=np.float32)} for x in (np.nan, np.inf, 1e-6)),
        {"teacher_logprobs": np.full(2, -1, dtype=np.float32)},
        {"teacher_logprobs": np.full(4, -1, dtype=np.float32)},
        {"trusted": np.ones(2, dtype=np.bool_)},
        {"topk_ids": np.array([[0, 1]], dtype=np.int32)},
        {"topk_ids": np.array([[0, 1, -1]], dtype=np.int32)},
        {"topk_ids": np.array([[0, 1, V]], dtype=np.int32)},
        {"topk_positions": np.array([-1], dtype=np.int32)},
        {"topk_positions": np.array([3], dtype=np.int32)},
        {"topk_positions": np.array([-(2**31)], dtype=np.int32)},
    ],
    ids=range(18),
)
def test_an_answer_with_unusable_numbers_is_refused_by_sequence(change: dict[str, Any]) -> None:
    bad = ScoreResponse([scored(3, **change), scored(1)], "w")
    with pytest.raises(ProtocolError) as caught:
        decode_answer(encode_response(bad, k=3, entropy=False))
    assert caught.value.sequence == 0


@pytest.mark.parametrize("entropy", [np.nan, np.inf])
def test_an_entropy_must_be_finite_and_there_if_asked_for(entropy: float) -> None:
    asked = ScoreRequest([item([2, 3])], AllTrusted(), "none", 0, True, V)
    none = replace(
        scored(1),
        topk_positions=np.zeros(0, dtype=np.int32),
        topk_ids=np.zeros((0, 0), dtype=np.int32),
        topk_logprobs=np.zeros((0, 0), dtype=np.float32),
        tail=np.zeros(0, dtype=np.float32),
    )
    bad = replace(none, entropy=np.array([entropy], dtype=np.float32))
    with pytest.raises(ProtocolError, match="entropies"):
        decode_response(encode_response(ScoreResponse([bad]), k=0, entropy=True), asked)
    with pytest.raises(ProtocolError, match="entropies"):
        decode_response(encode_response(ScoreResponse([none]), k=0, entropy=True), asked)
    with pytest.raises(ProtocolError):
        decode_response(encode_response(ScoreResponse([none]), k=0, entropy=False), asked)


@pytest.mark.parametrize("k", [2**31, 2**62, 10**30])
def test_an_answer_that_claims_enormous_alternatives_is_refused(k: int) -> None:
    options = pa.ipc.open_stream(GOOD_ANSWER).schema.metadata[b"tropd.options"]
    with pytest.raises(ProtocolError, match="option k"):
        decode_answer(with_options(GOOD_ANSWER, options.replace(b'"k":3', f'"k":{k}'.encode())))


def test_tokens_without_any_probability_are_sound() -> None:
    impossible = scored(
        3,
        teacher_logprobs=np.full(3, -np.inf, dtype=np.float32),
        topk_logprobs=np.array([[0, -np.inf, -np.inf]], dtype=np.float32),
        tail=np.array([-np.inf], dtype=np.float32),
    )
    got = decode_answer(encode_response(ScoreResponse([impossible, scored(1)], "w"), k=3, entropy=False))
    assert np.isneginf(got.items[0].teacher_logprobs).all()
    assert np.isneginf(got.items[0].tail).all()
