"""Malformed requests of every kind that we could think of, and a service that must refuse each with a reason."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.objectives.partition_specs import SampledPartition
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    ProtocolError,
    ScoreItem,
    ScoreRequest,
    decode_request,
    decode_response,
    encode_request,
)

V, LONGEST, MAX_BYTES, MAX_TOKENS = 24, 64, 1 << 16, 500
OPTIONS = b"tropd.options"
Random = np.random.Generator


@dataclass(frozen=True)
class Shot:
    """A request that no honest client sends."""

    body: bytes
    headers: Mapping[str, str]


def good_request(random: Random) -> ScoreRequest:
    """A request that must be answered."""
    items = []
    for _ in range(int(random.integers(1, 5))):
        n = int(random.integers(2, 20))
        start = int(random.integers(1, n))
        items.append(
            ScoreItem(
                random.integers(0, 22, n).astype(np.int32),
                start,
                -random.random(n - start, dtype=np.float32) * 4,
                int(random.integers(2**62)),
            )
        )
    return ScoreRequest(items, SampledPartition(), "outliers", 3, False, V)


# ----------------------------------------------------------------------------------------------- bytes


def noise(random: Random) -> bytes:
    return random.bytes(int(random.integers(2000)))


def noise_after_an_honest_beginning(random: Random) -> bytes:
    body = encode_request(good_request(random))
    return body[: int(random.integers(4, len(body)))] + random.bytes(int(random.integers(1, 600)))


def truncated(random: Random) -> bytes:
    body = encode_request(good_request(random))
    return body[: int(random.integers(0, len(body) - 8))]  # the mark of the end may be missing


def flipped(random: Random) -> bytes:
    body = bytearray(encode_request(good_request(random)))
    for place in random.integers(len(body), size=int(random.integers(1, 30))):
        body[place] ^= 1 << int(random.integers(8))
    return bytes(body)


def shuffled(random: Random) -> bytes:
    body = encode_request(good_request(random))
    cuts = sorted(random.integers(1, len(body), size=3).tolist())
    parts = [body[low:high] for low, high in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    return b"".join(parts[i] for i in random.permutation(len(parts)))


def huge_lengths(random: Random) -> bytes:
    """Large or negative numbers where the flatbuffers may have lengths and offsets."""
    body = bytearray(encode_request(good_request(random)))
    for _ in range(int(random.integers(1, 4))):
        kind, values = (("<i", (2**31 - 1, -1, -(2**31), 2**24)), ("<q", (2**62, -1, 2**40, -(2**63))))[
            int(random.integers(2))
        ]
        place = int(random.integers((len(body) - 8) // 4)) * 4
        struct.pack_into(kind, body, place, values[int(random.integers(4))])
    return bytes(body)


# --------------------------------------------------------------------------------------------- columns


def _table(random: Random) -> pa.Table:
    return pa.ipc.open_stream(encode_request(good_request(random))).read_all()


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def wrong_types(random: Random) -> bytes:
    table = _table(random)
    name = table.column_names[int(random.integers(4))]
    index = table.column_names.index(name)
    rows = table.num_rows
    others = [
        pa.array(["x"] * rows),
        pa.array([1.5] * rows),
        pa.array([b"\x80\x04."] * rows),  # a pickle
        pa.array([[1.0, 2.0]] * rows, pa.list_(pa.float64())),
        pa.array([[1, 2]] * rows, pa.list_(pa.int64())),
        pa.array([[1, 2]] * rows, pa.large_list(pa.int32())),
        pa.array([{"a": 1}] * rows),
        pa.array([None] * rows),
        pa.array(["x"] * rows).dictionary_encode(),
    ]
    return _stream(table.set_column(index, name, others[int(random.integers(len(others)))]))


def other_columns(random: Random) -> bytes:
    table = _table(random)
    names = table.column_names
    changes: list[Callable[[], pa.Table]] = [
        lambda: table.drop_columns([names[int(random.integers(4))]]),
        lambda: table.append_column("more", pa.array([1] * table.num_rows)),
        lambda: table.select(names[::-1]),
        lambda: table.rename_columns(["a", "b", "c", "d"]),
        lambda: table.select([]),
    ]
    return _stream(changes[int(random.integers(len(changes)))]())


def nulls(random: Random) -> bytes:
    table = _table(random)
    index = int(random.integers(4))
    field = table.schema.field(index)
    values = table.column(index).to_pylist()
    row = int(random.integers(len(values)))
    if isinstance(values[row], list) and random.integers(2):
        values[row][int(random.integers(len(values[row])))] = None
    else:
        values[row] = None
    return _stream(table.set_column(index, field, pa.array(values, field.type)))


# ---------------------------------------------------------------------------------------------- values


def bad_values(random: Random) -> bytes:
    """One sequence of an otherwise good request breaks one rule."""
    asked = good_request(random)
    row = int(random.integers(len(asked.sequences)))
    item = asked.sequences[row]
    tokens, student = item.tokens.copy(), item.student_logprobs.copy()
    place, at = int(random.integers(len(tokens))), int(random.integers(len(student)))
    start, seed = item.start, item.seed
    match int(random.integers(9)):
        case 0:
            tokens[place] = -int(random.integers(1, 2**31))
        case 1:
            tokens[place] = int(random.integers(V, 2**31))
        case 2:
            student[at] = (np.nan, np.inf, -np.inf)[int(random.integers(3))]
        case 3:
            student[at] = float(random.random()) * 10 + 0.01
        case 4:
            start = int(random.choice([0, -1, -(2**31), len(tokens), len(tokens) + 1, 2**31 - 1]))
        case 5:
            seed = -int(random.integers(1, 2**62))
        case 6:
            student = np.append(student, np.float32(-1.0))
        case 7:
            student = student[:-1]
        case _:
            tokens = np.zeros(int(random.choice([0, 1, LONGEST + 1, 5000])), dtype=np.int32)
    items = list(asked.sequences)
    items[row] = ScoreItem(tokens, start, student, seed)
    return encode_request(ScoreRequest(items, asked.partition, asked.topk, asked.k, asked.entropy, V))


def too_many_tokens(random: Random) -> bytes:
    n = LONGEST
    item = ScoreItem(np.zeros(n, np.int32), 1, np.full(n - 1, -1, np.float32), 0)
    return encode_request(ScoreRequest([item] * 9, SampledPartition(), "none", 0, False, V))


def bomb(random: Random) -> bytes:
    """Kilobytes that unfold to megabytes."""
    n = int(random.integers(MAX_BYTES // 4, 1 << 20))
    item = ScoreItem(np.zeros(n, np.int32), 1, np.full(n - 1, -1, np.float32), 0)
    return encode_request(ScoreRequest([item], SampledPartition(), "none", 0, False, V))


# --------------------------------------------------------------------------------------------- options


def bad_options(random: Random) -> bytes:
    table = _table(random)
    metadata = dict(table.schema.metadata or {})
    options = json.loads(metadata[OPTIONS])
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("version", (0, 2, "1", None, [], 10**30)),
        (
            "partition",
            ({"rule": "magic"}, "sampled", None, {}, {"rule": "ratio", "threshold": 7}, {"rule": ["all"]}),
        ),
        ("topk", ("some", 1, None, ["all"])),
        ("k", (-1, 0, 1025, 10**18, 1.5, "3", None)),
        ("entropy", ("no", 2, None)),
        ("vocab_limit", (0, -1, "24", None)),
        ("more", (1, {"a": []})),
    ]
    name, values = wrong[int(random.integers(len(wrong)))]
    texts = [
        lambda: json.dumps({**options, name: values[int(random.integers(len(values)))]}).encode(),
        lambda: json.dumps(
            {k: v for k, v in options.items() if k != (name if name != "more" else "k")}
        ).encode(),
        lambda: json.dumps([options]).encode(),
        lambda: b"[" * int(random.integers(1, 20_000)),
        lambda: random.bytes(int(random.integers(60))),
        lambda: b"",
        lambda: b'{"version": 1e999}',
        lambda: b"\xff\xfe{}",
    ]
    metadata[OPTIONS] = texts[int(random.integers(len(texts))) if random.integers(2) else 0]()
    return _stream(table.replace_schema_metadata(metadata))


def other_formats(random: Random) -> bytes:
    """What is Arrow but no such stream, and what is no Arrow at all."""
    table = _table(random)
    sink = pa.BufferOutputStream()
    match int(random.integers(6)):
        case 0:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case 1:
            with pa.ipc.new_stream(sink, table.schema):
                pass  # no batch
        case 2:
            pa.ipc.write_tensor(pa.Tensor.from_numpy(np.zeros((3, 3))), sink)
        case 3:
            sink.write(json.dumps({"sequences": [[1, 2, 3]]}).encode())
        case 4:
            sink.write(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.")
        case _:
            sink.write(table.schema.serialize().to_pybytes())
    data: bytes = sink.getvalue().to_pybytes()
    return data


BODIES: tuple[Callable[[Random], bytes], ...] = (
    noise,
    noise_after_an_honest_beginning,
    truncated,
    flipped,
    shuffled,
    huge_lengths,
    wrong_types,
    other_columns,
    nulls,
    bad_values,
    too_many_tokens,
    bomb,
    bad_options,
    other_formats,
)


def shot(random: Random, number: int) -> tuple[str, Shot]:
    """The ``number``-th malformed request and the name of its kind."""
    make = BODIES[number % len(BODIES)]
    headers = {"Content-Type": CONTENT_TYPE}
    kind = make.__name__
    body = make(random)
    if number % 41 == 0:
        kind, body = "wrong content type", encode_request(good_request(random))
        headers = {
            "Content-Type": str(random.choice(["application/json", "", "text/plain", "\\", "a/b;c=d"]))
        }
    elif number % 43 == 0:
        kind, body = "too large", bytes(MAX_BYTES + int(random.integers(1, 5000)))
    return kind, Shot(body, headers)


def is_valid(body: bytes) -> bool:
    """Whether changed bytes happen to be a request that may be answered."""
    try:
        asked = decode_request(body, vocab_size=V, max_length=LONGEST, max_bytes=MAX_BYTES)
    except ProtocolError:
        return False
    return sum(len(item.tokens) for item in asked.sequences) <= MAX_TOKENS


async def fire(
    engine: Any, shots: int, seed: int, expected: Callable[[list[int], int], Any], tolerance: float = 0.0
) -> Counter[str]:
    """Send malformed requests to a service in this process; after every 100 a good one must get the right answer.

    Args:
        expected: the log-probs of a sequence's tokens from a start index.

    Returns how many were refused per kind and status. Changed bytes that happen to make a valid request are not
    counted, and another one is sent.
    """
    random = np.random.default_rng(seed)
    settings = ServiceConfig(max_request_bytes=MAX_BYTES, max_request_tokens=MAX_TOKENS)
    info = ServiceInfo(
        model="toy",
        weights="w",
        tokenizer="t",
        tokenizer_size=V,
        vocab_size=V,
        max_length=LONGEST,
        max_request_tokens=MAX_TOKENS,
        max_request_bytes=MAX_BYTES,
        queue_tokens=settings.queue_tokens,
    )
    app = create_app(engine, info, settings, None)
    refused: Counter[str] = Counter()
    number = 0
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://teacher") as http:
            while refused.total() < shots:
                number += 1
                kind, sent = shot(random, number)
                answer = await http.post("/v1/score", content=sent.body, headers=sent.headers)
                if answer.status_code == 200 and is_valid(sent.body):
                    continue
                assert 400 <= answer.status_code < 500, (number, kind, answer.status_code, answer.text)
                assert answer.json()["error"], (number, kind)
                refused[f"{kind}: {answer.status_code}"] += 1
                if refused.total() % 100 == 0:
                    good = good_request(random)
                    headers = {"Content-Type": CONTENT_TYPE}
                    sound = await http.post("/v1/score", content=encode_request(good), headers=headers)
                    assert sound.status_code == 200, (number, sound.text)
                    for item, got in zip(
                        good.sequences, decode_response(sound.content, good).items, strict=True
                    ):
                        wanted = expected(item.tokens.tolist(), item.start)
                        assert np.allclose(got.teacher_logprobs, wanted, rtol=0, atol=tolerance), number
    finally:
        app.state.batcher.close()
    return refused


def fuzz(
    engine: Any, shots: int, seed: int, expected: Callable[[list[int], int], Any], tolerance: float = 0.0
) -> Counter[str]:
    """See ``fire``."""
    return asyncio.run(fire(engine, shots, seed, expected, tolerance))
