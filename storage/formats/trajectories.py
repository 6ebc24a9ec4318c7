"""Trajectories: token sequences sampled from a model, in Parquet (zstd), one file per shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.storage.bounds import are_logprobs
from tropd.storage.disk.atomic import atomic_file
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError
from tropd.storage.stage.manifest import Manifest, check_shard

SCHEMA_VERSION = "1"
ROW_GROUP_ROWS = 1024

FinishReason = Literal["stop", "length"]
Author = Literal["teacher", "student"]


@dataclass(frozen=True)
class Trajectory:
    """One sampled response.

    ``sampled_logprobs`` are natural log-probs of ``tokens`` under the full softmax of the model that wrote
    them, at temperature 1, whatever the sampling temperature. ``tokens`` ends with the end-of-sequence token
    if ``finish_reason`` is ``stop``.
    """

    prompt_id: str
    sample_index: int
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    sampled_logprobs: Sequence[float]
    finish_reason: FinishReason
    text: str
    author: Author
    meta: dict[str, str] = field(default_factory=dict)


SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("sampled_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("author", pa.string(), nullable=False),
        pa.field("meta", pa.map_(pa.string(), pa.string()), nullable=False),
    ],
    metadata={b"tropd.schema": b"trajectories", b"tropd.schema_version": SCHEMA_VERSION.encode()},
)


def write_trajectories(path: Path, rows: Iterable[Trajectory]) -> int:
    """Write one shard atomically; returns the number of rows.

    Raises:
        ValueError: a row whose tokens and log-probs do not match, or with a NaN or positive log-prob.
        DiskError: the disk is full or failing.
    """
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    num_rows = 0
    for row in rows:
        _check_row(row)
        num_rows += 1
        for name in SCHEMA.names:
            value = getattr(row, name)
            columns[name].append(sorted(value.items()) if name == "meta" else value)
    table = pa.table(columns, schema=SCHEMA)
    with atomic_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            compression_level=3,
            row_group_size=ROW_GROUP_ROWS,
            write_page_checksum=True,
        )
    return num_rows


def _check_row(row: Trajectory) -> None:
    where = f"trajectory {row.prompt_id!r}, sample {row.sample_index}"
    if len(row.tokens) != len(row.sampled_logprobs):
        raise ValueError(f"{where}: {len(row.tokens)} tokens, but {len(row.sampled_logprobs)} log-probs")
    if not are_logprobs(row.sampled_logprobs):
        raise ValueError(f"{where}: a log-prob is NaN or positive")


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Read one shard, a row group at a time; page checksums are verified.

    Raises:
        DamagedShardError: the file is not readable as trajectories.
        WorkspaceVersionError: it has another schema version.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            version = (schema.metadata or {}).get(b"tropd.schema_version", b"none").decode()
            if version != SCHEMA_VERSION:
                raise WorkspaceVersionError(
                    f"{path} has trajectory schema version {version}; this tropd reads version {SCHEMA_VERSION}",
                    hint="use the tropd version that wrote it, or make the file again",
                )
            if not schema.equals(SCHEMA):
                raise pa.ArrowInvalid(f"its columns are {schema.names}, not those of trajectories")
            missing = sum(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
            for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS):
                missing -= batch.num_rows
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield Trajectory(**cast(dict[str, object], row))  # type: ignore[arg-type]
            if missing:
                raise pa.ArrowInvalid(f"its row counts disagree by {missing}")
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise DamagedShardError(
            f"{path} is not readable: {error}", hint="tropd verify finds the damage"
        ) from error


def iter_stage(folder: Path, manifest: Manifest) -> Iterator[tuple[str, list[Trajectory]]]:
    """The shards of a trajectory stage in order as ``(name, rows)``; each is checked before it is read.

    Raises:
        DamagedShardError: a shard does not match its checksum.
    """
    for shard in manifest.shards.values():
        check_shard(folder, shard)
        yield shard.name, list(read_trajectories(folder / shard.name))
