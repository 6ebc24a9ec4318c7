"""Tools on a whole teacher cache: statistics, export to Parquet, and merging.

All stream shard by shard, so that a cache may be larger than memory. Nothing here scores or changes a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.storage.cache.shard import TopK, read_topk
from tropd.storage.cache.topk_encoding import probabilities
from tropd.storage.disk.atomic import atomic_directory, atomic_file
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, Shard, check_shard, read_manifest
from tropd.storage.stage.stage import open_stage
from tropd.storage.verify.checks import TrajectoryTable, belongs_to
from tropd.storage.workspace import Workspace

EXPORT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("sampled_logprobs", pa.list_(pa.float32())),
        ("tail_logprobs", pa.list_(pa.float32())),
        ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
    ],
    metadata={b"tropd.schema": b"topk-export", b"tropd.schema_version": b"1"},
)
_EXPORT_ROWS = 256


@dataclass(frozen=True)
class CacheStats:
    """Content of a cache. Means are over tokens."""

    rows: int
    tokens: int
    shards: int
    bytes: int
    k: int
    """Most alternatives a token may have: the setting if the manifest has it, else the most that any has."""
    bytes_per_token: float
    dense_bytes_per_token: float
    """The plain layout: k ids as int32 and log-probs as float16, and the sampled log-prob as float32."""
    compression_ratio: float
    kept_mass: float
    alternatives_per_token: float
    alternatives_histogram: dict[int, int]
    """Number of alternatives → number of tokens."""
    entropy: float
    """Entropy in nats of the alternatives and the tail as one bucket: a lower bound of the teacher's."""


def cache_stats(workspace: Workspace) -> CacheStats:
    """Read the whole cache once.

    Raises:
        DataError: the cache does not exist.
        DamagedShardError: a shard is not what its manifest says.
    """
    manifest, shards = _scores(workspace)
    histogram = np.zeros(1 << 16, dtype=np.int64)
    rows = tokens = 0
    kept_mass = entropy = 0.0
    for shard in shards:
        data = _checked(workspace, shard)
        histogram += np.bincount(data.counts, minlength=1 << 16)
        rows += data.num_rows
        tokens += data.num_tokens
        mass = probabilities(data.logprobs)
        tail = np.exp(data.tail.astype(np.float64))
        kept_mass += float((1.0 - tail).sum())
        # 0·log 0 = 0: an alternative or a tail without mass adds nothing.
        entropy -= float((mass * data.logprobs.astype(np.float64)).sum())
        entropy -= float((tail[tail > 0] * data.tail[tail > 0].astype(np.float64)).sum())
    present = np.flatnonzero(histogram)
    setting = manifest.fields.get("scores.k")
    k = setting if isinstance(setting, int) else int(present.max(initial=0))
    num_bytes = sum(shard.size for shard in shards)
    per_token, dense = num_bytes / max(tokens, 1), k * 6.0 + 4.0
    return CacheStats(
        rows=rows,
        tokens=tokens,
        shards=len(shards),
        bytes=num_bytes,
        k=k,
        bytes_per_token=per_token,
        dense_bytes_per_token=dense,
        compression_ratio=dense / per_token if per_token else 0.0,
        kept_mass=kept_mass / max(tokens, 1),
        alternatives_per_token=float((histogram * np.arange(1 << 16)).sum()) / max(tokens, 1),
        alternatives_histogram={int(n): int(histogram[n]) for n in present},
        entropy=entropy / max(tokens, 1),
    )


def export_parquet(workspace: Workspace, out: Path) -> int:
    """Write the cache with the trajectories' tokens as one Parquet file of list columns; returns its rows.

    Raises:
        DataError: the cache does not exist, or does not belong to the trajectories.
        DamagedShardError: a shard is not what its manifest says.
        DiskError: the disk is full or failing.
    """
    manifest, shards = _scores(workspace)
    prefixes = read_manifest(workspace.stage("prefixes"))
    if prefixes is None or not belongs_to(manifest, prefixes):
        raise DataError(
            f"{workspace.stage('scores')} was made from other trajectories than the ones in prefixes/",
            hint="rerun tropd score-teacher",
        )
    num_rows = 0
    with (
        atomic_file(out) as temporary,
        pq.ParquetWriter(temporary, EXPORT_SCHEMA, compression="zstd") as writer,
    ):
        for shard in shards:
            name = Path(shard.name).with_suffix(".parquet").name
            if name not in prefixes.shards:
                raise DataError(f"{shard.name} has no trajectories: prefixes/{name} is not in their manifest")
            check_shard(workspace.stage("prefixes"), prefixes.shards[name])
            table = TrajectoryTable(workspace.stage("prefixes") / name)
            for batch in _export_batches(_checked(workspace, shard), table):
                writer.write_batch(batch)
                num_rows += batch.num_rows
    return num_rows


def export_datasets(workspace: Workspace, out: Path) -> int:
    """Like ``export_parquet``, but a directory for ``datasets.load_from_disk``; replaces ``out`` if it exists.

    Raises:
        ConfigError: the ``datasets`` library is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "this export needs the Hugging Face datasets library", hint='pip install "tropd[datasets]"'
        ) from None
    with TemporaryDirectory(dir=out.absolute().parent) as scratch, atomic_directory(out) as folder:
        table = Path(scratch) / "cache.parquet"
        num_rows = export_parquet(workspace, table)
        cached = str(Path(scratch) / "cache")
        datasets.Dataset.from_parquet(str(table), cache_dir=cached).save_to_disk(folder)
    return num_rows


def _export_batches(data: TopK, table: TrajectoryTable) -> Iterator[pa.RecordBatch]:
    firsts = np.concatenate([[0], np.cumsum(data.counts, dtype=np.int64)])
    for low in range(0, data.num_rows, _EXPORT_ROWS):
        high = min(low + _EXPORT_ROWS, data.num_rows)
        offsets = data.offsets[low : high + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        inner = firsts[tokens.start : tokens.stop + 1]
        kept = slice(int(inner[0]), int(inner[-1]))
        columns = [
            pa.array(table.ids[low:high], pa.string()),
            pa.array(table.samples[low:high], pa.int32()),
            _lists(offsets, pa.array(table.tokens[tokens])),
            _lists(offsets, pa.array(data.teacher_logprobs[tokens])),
            _lists(offsets, pa.array(data.tail[tokens])),
            _lists(offsets, _lists(inner, pa.array(data.ids[kept]))),
            _lists(offsets, _lists(inner, pa.array(data.logprobs[kept].astype(np.float32)))),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=EXPORT_SCHEMA)


def _lists(offsets: npt.NDArray[np.int64], values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), values)


def merge_caches(sources: Sequence[Workspace], target: Workspace) -> Manifest:
    """Copy the score shards of ``sources`` that ``target`` lacks into its scores stage; returns its manifest.

    Every copied shard is checked first. The result is complete if one of the caches was; otherwise rerunning
    the stage scores the missing shards.

    Raises:
        DataError: a source has no cache, or two caches have different content under one name.
        FingerprintMismatchError: a cache was made with other settings or inputs (every field is named).
        DamagedShardError: a shard is not what its manifest says.
    """
    if not sources:
        raise DataError("no caches to merge")
    complete: Manifest | None = None
    for source in sources:
        manifest, _ = _scores(source)
        folder = source.stage("scores")
        with open_stage(target.stage("scores"), manifest.stage, Fingerprint(manifest.fields)) as stage:
            for shard in manifest.shards.values():
                known = stage.manifest.shards.get(shard.name)
                if known is not None and known != shard:
                    raise DataError(
                        f"{shard.name} differs between {folder} and another cache of the same fingerprint",
                        hint="tropd verify says which of them is damaged",
                    )
                if known is None:
                    check_shard(folder, shard)
                    _copy(folder / shard.name, stage.folder / shard.name)
                    stage.commit(shard.name, shard.rows)
            if manifest.complete:
                complete = manifest
            if complete is not None and not stage.complete:
                stage.finish(**complete.summary)
            merged = stage.manifest
    return merged


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        with atomic_directory(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        with atomic_file(target) as file:
            shutil.copyfile(source, file)


def _scores(workspace: Workspace) -> tuple[Manifest, list[Shard]]:
    manifest = read_manifest(workspace.stage("scores"))
    if manifest is None:
        raise DataError(f"{workspace.root} has no teacher cache", hint="tropd score-teacher makes it")
    return manifest, [shard for shard in manifest.shards.values() if shard.name.endswith(".zarr")]


def _checked(workspace: Workspace, shard: Shard) -> TopK:
    check_shard(workspace.stage("scores"), shard)
    return read_topk(workspace.stage("scores") / shard.name)
