"""Invariants inside a shard, by kind, for ``verify``, which has checked the checksums before.

A checksum proves that a shard is what its writer wrote; these checks find mistakes of the writer, and
stages that do not belong together. Each function returns problems in words, an empty list if there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.storage.bounds import are_logprobs
from tropd.storage.cache.shard import TopK, check_invariants, read_topk
from tropd.storage.cache.topk_encoding import RANGE, q8_error
from tropd.storage.errors import TropdError
from tropd.storage.formats.trajectories import SCHEMA
from tropd.storage.stage.fingerprint import Scalar
from tropd.storage.stage.manifest import Manifest, Shard

# The sampled log-prob is float32, the alternatives are rounded to float16 (11 bits) or coarser.
_RELATIVE_TOLERANCE = 2.0**-10
_ABSOLUTE_TOLERANCE = 2e-3


class TrajectoryTable:
    """The columns of a trajectory shard that checks compare; ``tokens`` and ``logprobs`` are flat."""

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path, columns=["prompt_id", "sample_index", "tokens", "sampled_logprobs"])
        self.ids = table["prompt_id"].to_pylist()
        self.samples = table["sample_index"].to_pylist()
        self.lengths = _lengths(table["tokens"])
        self.logprob_lengths = _lengths(table["sampled_logprobs"])
        self.tokens = _flat(table["tokens"])
        self.logprobs = _flat(table["sampled_logprobs"])

    @property
    def keys(self) -> list[tuple[str, int]]:
        return list(zip(self.ids, self.samples, strict=True))


def _lengths(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(column.combine_chunks().value_lengths()).astype(np.int64)


def _flat(column: Any) -> npt.NDArray[Any]:
    return np.asarray(column.combine_chunks().flatten())


def vocab_size(fields: Mapping[str, Scalar]) -> int | None:
    """The teacher's vocabulary size, if the stage's fingerprint has it."""
    value = fields.get("teacher.vocab_size")
    return value if isinstance(value, int) else None


def check_rows(path: Path, shard: Shard, schema: pa.Schema | None = None) -> list[str]:
    """The row count of a Parquet shard, and its columns if a schema is given."""
    try:
        with pq.ParquetFile(path) as parquet:
            found, names = parquet.metadata.num_rows, parquet.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        return [f"is not readable as Parquet ({error})"]
    problems = [] if found == shard.rows else [f"has {found} rows, its manifest says {shard.rows}"]
    if schema is not None and names != schema.names:
        problems.append(f"has columns {', '.join(names)} instead of {', '.join(schema.names)}")
    return problems


def check_trajectories(path: Path, shard: Shard, seen: dict[tuple[str, int], str]) -> list[str]:
    """Rows, lengths and log-probs of a trajectory shard; ``seen`` collects keys over the whole stage."""
    if problems := check_rows(path, shard, SCHEMA):
        return problems
    table = TrajectoryTable(path)
    if np.any(table.lengths != table.logprob_lengths):
        row = int(np.argmax(table.lengths != table.logprob_lengths))
        problems.append(
            f"row {row} has {table.lengths[row]} tokens and {table.logprob_lengths[row]} log-probs"
        )
    if not are_logprobs(table.logprobs):
        problems.append("has NaN or positive log-probs")
    if len(table.tokens) and table.tokens.min() < 0:
        problems.append("has negative token ids")
    for key in table.keys:
        if key in seen:
            problems.append(f"repeats prompt {key[0]!r}, sample {key[1]} of {seen[key]}")
        seen.setdefault(key, shard.name)
    return problems


def check_scores(path: Path, shard: Shard, fields: Mapping[str, Scalar], source: Path | None) -> list[str]:
    """The invariants of a top-k shard, and its agreement with the trajectories in ``source`` that it scores."""
    try:
        data = read_topk(path)
    except TropdError as error:
        return [error.message]
    problems = check_invariants(data, vocab_size=vocab_size(fields))
    if data.num_rows != shard.rows:
        problems.append(f"has {data.num_rows} rows, its manifest says {shard.rows}")
    if source is not None and not problems:
        problems = _against_trajectories(
            data, TrajectoryTable(source), fields.get("scores.precision") == "q8"
        )
    return problems


def _against_trajectories(data: TopK, table: TrajectoryTable, coarse: bool) -> list[str]:
    if not np.array_equal(np.diff(data.offsets), table.lengths):
        return ["does not have the rows and lengths of the trajectories that it scores"]
    token_of = np.repeat(np.arange(data.num_tokens), data.counts)
    is_sampled = data.ids == table.tokens[token_of]
    kept = data.logprobs.astype(np.float64)
    sampled = data.teacher_logprobs.astype(np.float64)
    if coarse:
        sampled = np.maximum(sampled, -RANGE)
    entropy = np.zeros(data.num_tokens)
    np.subtract.at(entropy, token_of, np.exp(kept) * kept)
    difference = np.abs(kept[is_sampled] - sampled[token_of[is_sampled]])
    allowed = _tolerance(kept[is_sampled], entropy[token_of[is_sampled]], coarse)
    problems = []
    if (difference > allowed).any():
        where = int(token_of[is_sampled][np.argmax(difference - allowed)])
        problems.append(
            f"the sampled log-prob differs from the alternative with the same id at token {where}"
        )
    if np.any(np.bincount(token_of[is_sampled], minlength=data.num_tokens) > 1):
        problems.append("an id is listed twice among the alternatives of a token")
    outside = np.ones(data.num_tokens, dtype=bool)
    outside[token_of[is_sampled]] = False
    # A token that is not among the alternatives has its mass in the tail, and is no likelier than the last.
    starts = np.concatenate([[0], np.cumsum(data.counts, dtype=np.int64)])
    has_any = data.counts > 0
    least = np.zeros(data.num_tokens)
    least[has_any] = kept[starts[1:][has_any] - 1]
    if np.any(outside & (sampled > least + _tolerance(least, entropy, coarse))):
        problems.append("a sampled token outside the alternatives is likelier than they are")
    return problems


def _tolerance(
    logprobs: npt.NDArray[np.float64], entropy: npt.NDArray[np.float64], coarse: bool
) -> npt.NDArray[np.float64]:
    """Largest distance of a stored log-prob from a float32 one; ``entropy`` is that of the token's alternatives."""
    rounding = _ABSOLUTE_TOLERANCE + _RELATIVE_TOLERANCE * np.abs(logprobs)
    return rounding + q8_error(logprobs, entropy) if coarse else rounding


def check_score_rows(path: Path, shard: Shard, source: Path | None) -> list[str]:
    """The row table of a score shard names the same trajectories in the same order."""
    if problems := check_rows(path, shard):
        return problems
    table = pq.read_table(path, columns=["prompt_id", "sample_index"])
    keys = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    if source is not None and keys != TrajectoryTable(source).keys:
        return ["does not name the trajectories of the shard that it belongs to"]
    return []


def belongs_to(scores: Manifest, source: Manifest | None) -> bool:
    """True if the scores were made from these trajectories, or from unknown ones."""
    if source is None:
        return False
    return scores.fields.get(f"upstream.{source.stage}") in (None, source.fingerprint)
