"""Trajectory shards: exact round trips, refusal of nonsense, no silent damage."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import trajectory

from tropd.storage.errors import DamagedShardError, TropdError, WorkspaceVersionError
from tropd.storage.formats.trajectories import (
    SCHEMA,
    Trajectory,
    iter_stage,
    read_trajectories,
    write_trajectories,
)
from tropd.storage.stage.manifest import Manifest, describe_shard

ids = st.integers(0, 2**31 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@st.composite
def rows(draw: st.DrawFn) -> Trajectory:
    tokens = draw(st.lists(ids, max_size=6))
    logprobs = draw(
        st.lists(
            st.floats(max_value=0.0, width=32, allow_nan=False), min_size=len(tokens), max_size=len(tokens)
        )
    )
    return Trajectory(
        prompt_id=draw(texts),
        sample_index=draw(ids),
        prompt_tokens=draw(st.lists(ids, max_size=4)),
        tokens=tokens,
        sampled_logprobs=logprobs,
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(texts),
        author=draw(st.sampled_from(["teacher", "student"])),
        meta=draw(st.dictionaries(texts, texts, max_size=2)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, listed: list[Trajectory]) -> None:
    path = tmp_path_factory.mktemp("t") / "part.parquet"
    assert write_trajectories(path, iter(listed)) == len(listed)
    assert list(read_trajectories(path)) == listed


def test_bytes_do_not_depend_on_time_or_meta_order(tmp_path: Path) -> None:
    row = trajectory(1)
    for name, meta in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_trajectories(tmp_path / name, [dataclasses.replace(row, meta=meta)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_row_groups_bound_memory(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "p", [trajectory(i) for i in range(2500)])
    parquet = pq.ParquetFile(tmp_path / "p")
    assert [parquet.metadata.row_group(i).num_rows for i in range(3)] == [1024, 1024, 452]
    assert [row.prompt_id for row in read_trajectories(tmp_path / "p")] == [f"p{i}" for i in range(2500)]


@pytest.mark.parametrize("logprobs", [[-1.0] * 4, [-1.0] * 4 + [math.nan], [-1.0] * 4 + [0.5]])
def test_nonsense_is_refused_before_it_is_stored(tmp_path: Path, logprobs: list[float]) -> None:
    row = dataclasses.replace(trajectory(3), sampled_logprobs=logprobs)
    with pytest.raises(ValueError, match="trajectory 'p3', sample 0"):
        write_trajectories(tmp_path / "p", [trajectory(1), row])
    assert not (tmp_path / "p").exists()


def test_damaged_pages_are_refused(tmp_path: Path) -> None:
    """Checksums cover the pages; for headers and the footer the reader may only not fail in another way.

    That a changed footer can read as fewer rows is why ``iter_stage`` checks the whole file first.
    """
    path = tmp_path / "p"
    listed = [trajectory(i, num_tokens=300) for i in range(40)]
    write_trajectories(path, listed)
    stored = list(read_trajectories(path))
    good = path.read_bytes()
    tokens = pq.ParquetFile(path).metadata.row_group(0).column(3)
    assert tokens.path_in_schema.startswith("tokens")
    start = tokens.dictionary_page_offset or tokens.data_page_offset
    rng = random.Random(0)
    refused = {"tokens": 0, "anywhere": 0}
    for kind in ["tokens", "anywhere"] * 150:
        bad = bytearray(good)
        where = (
            start + rng.randrange(tokens.total_compressed_size)
            if kind == "tokens"
            else rng.randrange(len(bad))
        )
        bad[where] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            read = list(read_trajectories(path))
            assert kind == "anywhere" or read == stored
        except TropdError:
            refused[kind] += 1
    assert refused["tokens"] > 140
    assert refused["anywhere"] > 100
    for length in range(0, len(good), 997):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedShardError, match="not readable"):
            list(read_trajectories(path))


def test_foreign_and_newer_files(tmp_path: Path) -> None:
    path = tmp_path / "p"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(WorkspaceVersionError, match="schema version none"):
        list(read_trajectories(path))
    newer = SCHEMA.with_metadata({b"tropd.schema_version": b"2"})
    pq.write_table(newer.empty_table(), path)
    with pytest.raises(WorkspaceVersionError, match="version 2; this tropd reads version 1"):
        list(read_trajectories(path))
    fewer = pa.schema([SCHEMA.field("text")], metadata=SCHEMA.metadata)
    pq.write_table(fewer.empty_table(), path)
    with pytest.raises(DamagedShardError, match="its columns are"):
        list(read_trajectories(path))
    with pytest.raises(DamagedShardError):
        list(read_trajectories(tmp_path / "absent"))


def test_iter_stage_checks_before_it_serves(tmp_path: Path) -> None:
    shards = {}
    for index in (1, 0):
        name = f"part-{index}.parquet"
        write_trajectories(tmp_path / name, [trajectory(index)])
        shards[name] = describe_shard(tmp_path, name, rows=1)
    manifest = Manifest(stage="prefixes", fingerprint="", fields={}, shards=dict(sorted(shards.items())))
    assert [(n, r[0].prompt_id) for n, r in iter_stage(tmp_path, manifest)] == [
        ("part-0.parquet", "p0"),
        ("part-1.parquet", "p1"),
    ]
    damaged = tmp_path / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedShardError, match=r"part-1\.parquet has sha256"):
        list(iter_stage(tmp_path, manifest))
