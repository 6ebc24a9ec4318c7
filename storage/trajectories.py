"""Trajectories: token sequences sampled from a model, in Parquet (zstd), one file per shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.storage.atomic import atomic_file
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError
from tropd.storage.manifest import Manifest, check_shard

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
    """Write one shard atomically; returns the number of rows."""
    listed = list(rows)
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for row in listed:
        for name in SCHEMA.names:
            value = getattr(row, name)
            columns[name].append(sorted(value.items()) if name == "meta" else value)
    table = pa.table(columns, schema=SCHEMA)
    with atomic_file(path) as temporary:
        pq.write_table(
            table, temporary, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS
        )
    return len(listed)


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Read one shard, a row group at a time.

    Raises:
        DamagedShardError: the file is not readable as Parquet.
        WorkspaceVersionError: it has another schema version.
    """
    try:
        parquet = pq.ParquetFile(path)
        metadata = parquet.schema_arrow.metadata or {}
        version = metadata.get(b"tropd.schema_version", b"none").decode()
        if version != SCHEMA_VERSION:
            raise WorkspaceVersionError(
                f"{path} has trajectory schema version {version}; this tropd reads version {SCHEMA_VERSION}",
                hint="use the tropd version that wrote it, or make the file again",
            )
        for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield Trajectory(**cast(dict[str, object], row))  # type: ignore[arg-type]
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedShardError(
            f"{path} is not readable: {error}", hint="tropd verify finds what is damaged"
        ) from error


def iter_stage(folder: Path, manifest: Manifest) -> Iterator[tuple[str, list[Trajectory]]]:
    """The shards of a trajectory stage in order as ``(name, rows)``; each is checked before it is read.

    Raises:
        DamagedShardError: a shard does not match its checksum.
    """
    for shard in manifest.shards.values():
        check_shard(folder, shard)
        yield shard.name, list(read_trajectories(folder / shard.name))
