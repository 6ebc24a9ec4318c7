"""Ids that the student chose, on the wire: version 2 of the messages, which are those of version 1 with more columns.

A request without such ids is sent in version 1, byte for byte as before: older services answer it, and older clients
are answered as they ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tropd.pipeline.teacher.wire.arrow_stream import ProtocolError, list_column
from tropd.storage.arrays import Floats32

VERSION = 2
MAX_CHOSEN = 1024
"""Most ids per token that may be asked for: the bound of ``objective.k``."""
TOKEN_BYTES, ID_BYTES = 8, 4
"""Upper bounds of an answer in memory: tail and overlap of a token, the log-prob of an id."""

_LIST_F32 = pa.list_(pa.float32())
_NOTHING = np.zeros(0, dtype=np.float32)


def request_schema(first: pa.Schema) -> pa.Schema:
    """The columns of a request of version 2."""
    return first.append(pa.field("chosen", pa.list_(pa.int32())))


def response_schema(first: pa.Schema) -> pa.Schema:
    """The columns of an answer of version 2."""
    for name in ("chosen_logprobs", "chosen_tail", "chosen_overlap"):
        first = first.append(pa.field(name, _LIST_F32))
    return first


def request_column(ids: Sequence[npt.NDArray[np.int32] | None]) -> pa.Array:
    """Ids ``[n, c]`` of each sequence."""
    return list_column([_NOTHING if i is None else i.reshape(-1) for i in ids], pa.int32())


def response_columns(
    logprobs: Sequence[Floats32 | None], tails: Sequence[Floats32 | None], overlaps: Sequence[Floats32 | None]
) -> list[pa.Array]:
    """Log-probs ``[n, c]``, tails ``[n]`` and overlaps ``[n]`` (empty lists if not asked for) of each sequence."""
    return [
        list_column([_NOTHING if r is None else r.reshape(-1) for r in rows], pa.float32())
        for rows in (logprobs, tails, overlaps)
    ]


def read_ids(
    row: int, flat: npt.NDArray[np.int32], scored: int, count: int, vocab_limit: int
) -> npt.NDArray[np.int32]:
    """``[n, c]`` the ids of a sequence with ``scored`` tokens, ``count`` for each.

    Raises:
        ProtocolError: more or fewer of them, one outside 0 … ``vocab_limit`` - 1, or one twice at a token.
    """
    if len(flat) != scored * count:
        raise ProtocolError(
            f"column 'chosen' has {len(flat)} ids for {scored} scored tokens, of which each has {count}", row
        )
    ids = flat.reshape(scored, count)
    outside = np.argwhere((ids < 0) | (ids >= vocab_limit))
    if len(outside):
        token, place = outside[0]
        raise ProtocolError(
            f"column 'chosen': id {ids[token, place]} at scored token {token} is outside 0 … {vocab_limit - 1}",
            row,
        )
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        token, place = twice[0]
        raise ProtocolError(
            f"column 'chosen': id {ordered[token, place]} is there twice at scored token {token}", row
        )
    return ids


def read_scores(
    row: int, values: Mapping[str, npt.NDArray[Any]], scored: int, count: int, *, overlap: bool
) -> tuple[Floats32, Floats32, Floats32 | None]:
    """Log-probs ``[n, c]``, tails ``[n]`` and overlaps of a sequence with ``scored`` tokens.

    Raises:
        ProtocolError: other numbers of them, a log-prob that is none, or a share that is none.
    """
    logprobs, tail, share = (values[f"chosen_{name}"] for name in ("logprobs", "tail", "overlap"))
    if (len(logprobs), len(tail), len(share)) != (scored * count, scored, scored if overlap else 0):
        raise ProtocolError(f"the answer does not have {count} log-probs for each of {scored} tokens", row)
    if any(np.isnan(part).any() or (part > 0.0).any() for part in (logprobs, tail)):
        raise ProtocolError("a log-prob of a chosen id, or a tail, is NaN or positive", row)
    if not ((share >= 0.0) & (share <= 1.0)).all():
        raise ProtocolError("an overlap is no share between 0 and 1", row)
    return logprobs.reshape(scored, count), tail, share if overlap else None
