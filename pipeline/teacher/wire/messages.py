"""The wire format of the teacher service: Arrow IPC streams, one record batch per message, one row per sequence.

Options and version travel as JSON in the schema's metadata. Nothing is unpickled; every field is checked, and
a message that does not fit raises ``ProtocolError`` with the number of the sequence at fault.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tropd.pipeline.objectives.partition_specs import Partition
from tropd.pipeline.teacher.wire import chosen_ids
from tropd.pipeline.teacher.wire.arrow_stream import (
    ProtocolError,
    column_arrays,
    column_integers,
    list_column,
    number_column,
    read_stream,
    write_stream,
)
from tropd.storage.arrays import Floats32
from tropd.storage.bounds import are_logprobs

__all__ = [
    "CONTENT_TYPE",
    "MAX_TOPK",
    "PROTOCOL_VERSION",
    "ProtocolError",
    "ScoreItem",
    "ScoreRequest",
    "ScoreResponse",
    "ScoredItem",
    "TopkScope",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "log_tail",
]

PROTOCOL_VERSION = 1
CONTENT_TYPE = "application/vnd.apache.arrow.stream"
MAX_TOPK = 1024
"""Most alternatives per token that may be asked for: the bound of ``objective.k``."""

_LIST_F32, _LIST_I32, _LIST_BOOL = pa.list_(pa.float32()), pa.list_(pa.int32()), pa.list_(pa.bool_())
_REQUEST = pa.schema(
    [("tokens", _LIST_I32), ("start", pa.int32()), ("student", _LIST_F32), ("seed", pa.int64())]
)
_RESPONSE = pa.schema(
    [
        ("teacher", _LIST_F32),
        ("trusted", _LIST_BOOL),
        ("entropy", _LIST_F32),
        ("positions", _LIST_I32),
        ("topk_ids", _LIST_I32),
        ("topk_logprobs", _LIST_F32),
        ("tail", _LIST_F32),
    ]
)
_CHOSEN_REQUEST, _CHOSEN_RESPONSE = chosen_ids.request_schema(_REQUEST), chosen_ids.response_schema(_RESPONSE)
# Upper bounds of an answer in memory: offsets of seven lists a row, a mask and four numbers a token, id and log-prob.
_MESSAGE_BYTES, _ROW_BYTES, _TOKEN_BYTES, _ALTERNATIVE_BYTES = 4096, 28, 17, 8

TopkScope = Literal["none", "outliers", "all"]


@dataclass(frozen=True)
class ScoreItem:
    """One sequence to score from token index ``start`` (≥ 1) to its end, n = len(tokens) - start ≥ 1 tokens."""

    tokens: npt.NDArray[np.int32]
    start: int
    student_logprobs: Floats32
    """``[n]`` of the scored tokens; the partition rule compares the teacher's with them."""
    seed: int
    """Of the uniform numbers that the sampled partition draws, one per token index (``seeds.uniforms``)."""
    chosen: npt.NDArray[np.int32] | None = None
    """``[n, c]`` ids that the student chose at the scored tokens, none twice at a token; None if none are asked about."""


@dataclass(frozen=True)
class ScoreRequest:
    """A request: K1 of every scored token, and top-k where ``topk`` says."""

    sequences: Sequence[ScoreItem]
    partition: Partition
    topk: TopkScope
    k: int
    entropy: bool
    vocab_limit: int
    """Top-k ids are below this: the ids that the student knows."""
    chosen: int = 0
    """Ids per token that the student chose, c; 0 if none."""
    overlap: bool = False
    """Whether it is asked how many of them are among as many likeliest ids of the teacher."""


@dataclass(frozen=True)
class ScoredItem:
    """The teacher's answer for one sequence's n scored tokens, of which m have alternatives."""

    teacher_logprobs: Floats32
    """``[n]``."""
    trusted: npt.NDArray[np.bool_]
    """``[n]`` the token has no outlier weight."""
    entropy: Floats32 | None
    """``[n]`` nats, if asked for."""
    topk_positions: npt.NDArray[np.int32]
    """``[m]`` indices of these among the n tokens, rising."""
    topk_ids: npt.NDArray[np.int32]
    """``[m, k]`` likeliest first."""
    topk_logprobs: Floats32
    """``[m, k]`` descending."""
    tail: Floats32
    """``[m]`` log of the mass outside the alternatives; -inf if none."""
    chosen_logprobs: Floats32 | None = None
    """``[n, c]`` of the ids that the student chose, if it did."""
    chosen_tail: Floats32 | None = None
    """``[n]`` log of the mass outside these; -inf if none."""
    chosen_overlap: Floats32 | None = None
    """``[n]`` share of them that are among the c likeliest, if asked for."""


@dataclass(frozen=True)
class ScoreResponse:
    """Answers in the order of the request."""

    items: Sequence[ScoredItem]
    teacher: str = ""
    """SHA-256 of the weights that gave the scores: a service may be replaced between two requests."""


class _RequestOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    partition: Partition
    topk: TopkScope
    k: Annotated[int, Field(ge=0, le=MAX_TOPK)]
    entropy: bool
    vocab_limit: Annotated[int, Field(ge=1)]


class _ChosenRequestOptions(_RequestOptions):
    chosen: Annotated[int, Field(ge=1, le=chosen_ids.MAX_CHOSEN)]
    overlap: bool


class _ResponseOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    k: Annotated[int, Field(ge=0, le=MAX_TOPK)]
    entropy: bool
    teacher: str


def encode_request(request: ScoreRequest) -> bytes:
    """Encode a request as bytes."""
    fields = {
        "version": version_of(request),
        "partition": request.partition,
        "topk": request.topk,
        "k": request.k,
        "entropy": request.entropy,
        "vocab_limit": request.vocab_limit,
    }
    more = {"chosen": request.chosen, "overlap": request.overlap} if request.chosen else {}
    options = (_ChosenRequestOptions if request.chosen else _RequestOptions).model_validate(fields | more)
    items = request.sequences
    columns = [
        list_column([i.tokens for i in items], pa.int32()),
        number_column([i.start for i in items], pa.int32()),
        list_column([i.student_logprobs for i in items], pa.float32()),
        number_column([i.seed for i in items], pa.int64()),
    ]
    if not request.chosen:
        return write_stream(columns, _REQUEST, options.model_dump_json())
    columns.append(chosen_ids.request_column([i.chosen for i in items]))
    return write_stream(columns, _CHOSEN_REQUEST, options.model_dump_json())


def version_of(request: ScoreRequest) -> int:
    """The version of the messages that a request and its answer are sent in: the first that has room for it."""
    return _version(request.chosen > 0)


def decode_request(
    data: bytes,
    *,
    vocab_size: int,
    max_length: int,
    max_bytes: int | None = None,
    max_chosen: int = chosen_ids.MAX_CHOSEN,
) -> ScoreRequest:
    """Parse and check a request. ``max_bytes`` is the most that it may take when decompressed.

    Args:
        max_chosen: most ids per token that a student may choose.

    Student log-probs are taken as they are, not clamped: client, service and trainer must compare the same numbers.

    Raises:
        ProtocolError: not a stream of this protocol, another version, ids outside ``vocab_size``, lengths that do
            not fit or exceed ``max_length``, student log-probs that are NaN, infinite or positive, options that
            contradict each other, more chosen ids than allowed, or other ones than tokens (see ``chosen_ids``).
    """
    batch, metadata = read_stream(data, _REQUEST, _CHOSEN_REQUEST, max_bytes=max_bytes)
    has_chosen = batch.num_columns > len(_REQUEST)
    options = _parse(_ChosenRequestOptions if has_chosen else _RequestOptions, metadata, _version(has_chosen))
    count, overlap = (options.chosen, options.overlap) if has_chosen else (0, False)
    if count > max_chosen:
        raise ProtocolError(f"option chosen: {count} ids per token, the teacher takes {max_chosen}")
    vocab_limit = min(options.vocab_limit, vocab_size)
    if options.topk != "none" and options.k == 0:
        raise ProtocolError(f"option topk: {options.topk!r} needs k of at least 1")
    if options.partition.rule == "teacher_entropy" and not options.entropy:
        raise ProtocolError("option entropy: partition rule 'teacher_entropy' needs it")
    tokens, students = column_arrays(batch, "tokens"), column_arrays(batch, "student")
    starts, seeds = column_integers(batch, "start"), column_integers(batch, "seed")
    chosen = column_arrays(batch, "chosen") if has_chosen else []
    items = []
    for row in range(batch.num_rows):
        item = ScoreItem(tokens[row], starts[row], students[row], seeds[row])
        _check_item(row, item, vocab_size, max_length)
        if has_chosen:
            ids = chosen_ids.read_ids(row, chosen[row], len(item.student_logprobs), count, vocab_limit)
            item = replace(item, chosen=ids)
        items.append(item)
    return ScoreRequest(
        items,
        options.partition,
        options.topk,
        options.k,
        options.entropy,
        vocab_limit,
        count,
        overlap,
    )


def _check_item(row: int, item: ScoreItem, vocab_size: int, max_length: int) -> None:
    length, student = len(item.tokens), item.student_logprobs
    if not 1 <= item.start < length:
        raise ProtocolError(
            f"start {item.start} leaves no token to score or no context ({length} tokens)", row
        )
    if length > max_length:
        raise ProtocolError(f"{length} tokens, the teacher takes {max_length}", row)
    if item.tokens.min() < 0 or item.tokens.max() >= vocab_size:
        raise ProtocolError(f"a token id is outside 0 … {vocab_size - 1}", row)
    if len(student) != length - item.start:
        raise ProtocolError(f"{len(student)} student log-probs for {length - item.start} scored tokens", row)
    if not (np.isfinite(student).all() and are_logprobs(student)):
        raise ProtocolError("a student log-prob is NaN, infinite or positive", row)
    if item.seed < 0:
        raise ProtocolError("the seed is negative", row)


def encode_response(response: ScoreResponse, *, k: int, entropy: bool, chosen: bool = False) -> bytes:
    """A response as bytes. Columns that were not asked for are empty lists, which cost next to nothing.

    Args:
        chosen: whether the request had ids that the student chose.
    """
    items = response.items
    none = np.zeros(0, dtype=np.float32)
    columns = [
        list_column([i.teacher_logprobs for i in items], pa.float32()),
        list_column([i.trusted for i in items], pa.bool_()),
        list_column([none if i.entropy is None else i.entropy for i in items], pa.float32()),
        list_column([i.topk_positions for i in items], pa.int32()),
        list_column([i.topk_ids.reshape(-1) for i in items], pa.int32()),
        list_column([i.topk_logprobs.reshape(-1) for i in items], pa.float32()),
        list_column([i.tail for i in items], pa.float32()),
    ]
    options = _ResponseOptions(version=_version(chosen), k=k, entropy=entropy, teacher=response.teacher)
    if chosen:
        columns += chosen_ids.response_columns(
            [i.chosen_logprobs for i in items],
            [i.chosen_tail for i in items],
            [i.chosen_overlap for i in items],
        )
    return write_stream(columns, _CHOSEN_RESPONSE if chosen else _RESPONSE, options.model_dump_json())


def decode_response(data: bytes, request: ScoreRequest) -> ScoreResponse:
    """Parse an answer and check that it answers ``request``.

    Raises:
        ProtocolError: another number of sequences or tokens, NaN or positive log-probs, ids out of range, or more
            bytes than such an answer can have.
    """
    rows, tokens = len(request.sequences), sum(len(asked.student_logprobs) for asked in request.sequences)
    most = _MESSAGE_BYTES + rows * _ROW_BYTES + tokens * (_TOKEN_BYTES + _ALTERNATIVE_BYTES * request.k)
    has_chosen = request.chosen > 0
    if has_chosen:
        most += rows * _ROW_BYTES + tokens * (chosen_ids.TOKEN_BYTES + chosen_ids.ID_BYTES * request.chosen)
    schema = _CHOSEN_RESPONSE if has_chosen else _RESPONSE
    batch, metadata = read_stream(data, schema, max_bytes=most)
    options = _parse(_ResponseOptions, metadata, _version(has_chosen))
    if batch.num_rows != len(request.sequences) or options.entropy != request.entropy:
        raise ProtocolError(f"the answer has {batch.num_rows} sequences for {len(request.sequences)} asked")
    columns = {name: column_arrays(batch, name) for name in schema.names}
    items = []
    for row, asked in enumerate(request.sequences):
        values = {name: column[row] for name, column in columns.items()}
        m = len(values["positions"])
        if len(values["topk_ids"]) != m * options.k or len(values["topk_logprobs"]) != m * options.k:
            raise ProtocolError("alternatives and positions do not fit", row)
        item = ScoredItem(
            teacher_logprobs=values["teacher"],
            trusted=values["trusted"],
            entropy=values["entropy"] if options.entropy else None,
            topk_positions=values["positions"],
            topk_ids=values["topk_ids"].reshape(m, options.k),
            topk_logprobs=values["topk_logprobs"].reshape(m, options.k),
            tail=values["tail"],
        )
        if has_chosen:
            found = chosen_ids.read_scores(
                row, values, len(asked.student_logprobs), request.chosen, overlap=request.overlap
            )
            item = replace(item, chosen_logprobs=found[0], chosen_tail=found[1], chosen_overlap=found[2])
        _check_answer(row, item, len(asked.student_logprobs), request.vocab_limit)
        items.append(item)
    return ScoreResponse(items, options.teacher)


def _check_answer(row: int, item: ScoredItem, n: int, vocab_limit: int) -> None:
    if not len(item.teacher_logprobs) == len(item.trusted) == n or len(item.tail) != len(item.topk_positions):
        raise ProtocolError(f"the answer does not have {n} tokens", row)
    if item.entropy is not None and (len(item.entropy) != n or not np.isfinite(item.entropy).all()):
        raise ProtocolError("the entropies are not one finite number per token", row)
    for values in (item.teacher_logprobs, item.topk_logprobs, item.tail):
        if np.isnan(values).any() or (values > 0.0).any():
            raise ProtocolError("a teacher log-prob is NaN or positive", row)
    if (item.topk_logprobs[:, 1:] > item.topk_logprobs[:, :-1]).any():
        raise ProtocolError("alternatives are not in falling order of their log-probs", row)
    if len(item.topk_positions):
        if (
            item.topk_positions.min() < 0
            or item.topk_positions.max() >= n
            or (np.diff(item.topk_positions) < 1).any()
        ):
            raise ProtocolError("positions of alternatives are not rising within the tokens", row)
        if item.topk_ids.size and (item.topk_ids.min() < 0 or item.topk_ids.max() >= vocab_limit):
            raise ProtocolError(f"an alternative's id is outside 0 … {vocab_limit - 1}", row)


def log_tail(topk_logprobs: Floats32) -> Floats32:
    """``[m]`` log(1 - Σ exp) of ``[m, k]`` log-probs in float64; -inf where nothing is left."""
    mass = np.exp(topk_logprobs.astype(np.float64)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(1.0 - mass, 0.0)).astype(np.float32)


def _version(has_chosen: bool) -> int:
    return chosen_ids.VERSION if has_chosen else PROTOCOL_VERSION


def _parse(model: type[Any], text: bytes, speaks: int) -> Any:
    try:
        version = json.loads(text)["version"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("the message has no options") from error
    if version != speaks:
        raise ProtocolError(f"protocol version {version!r}, messages with these columns are of {speaks}")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ProtocolError(f"option {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
