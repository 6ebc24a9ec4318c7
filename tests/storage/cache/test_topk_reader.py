"""Random access: the same data as reading whole shards, within its memory, and never damaged data."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_samples import build_workspace

from tropd.storage.cache import topk_reader
from tropd.storage.cache.shard import TopK, concatenate, read_topk
from tropd.storage.cache.topk_reader import Span, TopKReader
from tropd.storage.errors import DamagedShardError, DataError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, read_manifest
from tropd.storage.stage.stage import open_stage

PARTS, ROWS, TOKENS = 3, 4, 5


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_workspace(tmp_path / "w", parts=PARTS, rows=ROWS).stage("scores")


def assert_same(one: TopK, other: TopK) -> None:
    for field in dataclasses.fields(TopK):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


spans = st.lists(
    st.tuples(
        st.integers(0, PARTS - 1), st.integers(0, ROWS - 1), st.integers(0, 6), st.none() | st.integers(0, 7)
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=spans, memory=st.sampled_from([1, 2000, 1 << 20]), prefetch=st.booleans())
def test_spans_match_slices(folder: Path, asked: list, memory: int, prefetch: bool) -> None:
    whole = [read_topk(p) for p in sorted(folder.glob("*.zarr"))]
    expected = []
    for part, row, start, stop in asked:
        tokens = [whole[part].row(row).row(0, t + 1) for t in range(TOKENS)]
        chosen = range(TOKENS)[start : None if stop is None else max(stop, start)]
        pieces = [
            dataclasses.replace(
                tokens[t],
                offsets=np.array([0, 1]),
                counts=tokens[t].counts[-1:],
                ids=tokens[t].ids[len(tokens[t].ids) - int(tokens[t].counts[-1]) :],
                logprobs=tokens[t].logprobs[len(tokens[t].ids) - int(tokens[t].counts[-1]) :],
                tail=tokens[t].tail[-1:],
                teacher_logprobs=tokens[t].teacher_logprobs[-1:],
            )
            for t in chosen
        ]
        joined = concatenate(pieces)
        expected.append(dataclasses.replace(joined, offsets=np.array([0, len(pieces)])))
    with TopKReader(folder, manifest_of(folder), memory=memory, prefetch=prefetch) as reader:
        listed = [Span(f"part-{part:05d}.zarr", row, start, stop) for part, row, start, stop in asked]
        reader.prefetch(span.shard for span in listed)
        assert_same(reader.read(listed), concatenate(expected))
        assert reader.memory_used <= max(memory, 4000)


def test_a_single_span_is_a_view_and_shards_are_decoded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(topk_reader, "read_topk", lambda path: read.append(path.name) or read_topk(path))
    with TopKReader(folder, manifest_of(folder)) as reader:
        one, other = (reader.read([Span("part-00000.zarr", 1)]) for _ in range(2))
        assert np.shares_memory(one.ids, other.ids)
        reader.read([Span("part-00001.zarr", 0), Span("part-00000.zarr", 0), Span("part-00001.zarr", 1)])
    assert read == ["part-00000.zarr", "part-00001.zarr"]


def test_least_recently_used_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(topk_reader, "read_topk", lambda path: read.append(path.name[9]) or read_topk(path))
    with TopKReader(folder, manifest_of(folder)) as reader:
        reader.read([Span("part-00000.zarr", 0)])
        size = reader.memory_used
    read.clear()
    with TopKReader(folder, manifest_of(folder), memory=int(2.5 * size)) as reader:
        for part in (0, 1, 0, 2, 0, 1):
            reader.read([Span(f"part-0000{part}.zarr", 0)])
        assert reader.memory_used <= 2.5 * size
    assert "".join(read) == "0121"


@pytest.mark.parametrize("prefetch", [False, True])
def test_damage_is_never_served(folder: Path, prefetch: bool) -> None:
    path = folder / "part-00001.zarr" / "sampled" / "c" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with TopKReader(folder, manifest_of(folder), prefetch=prefetch) as reader:
        reader.prefetch(reader.shards)
        assert reader.read([Span("part-00000.zarr", 0)]).num_rows == 1
        for _ in range(2):
            with pytest.raises(DamagedShardError, match=r"part-00001\.zarr has sha256"):
                reader.read([Span("part-00001.zarr", 0)])


def test_wrong_requests(folder: Path) -> None:
    with TopKReader(folder, manifest_of(folder)) as reader:
        with pytest.raises(DataError, match="has 4 rows, row 9"):
            reader.read([Span("part-00000.zarr", 9)])
        with pytest.raises(DamagedShardError, match="not in the manifest"):
            reader.read([Span("part-00009.zarr", 0)])
        with pytest.raises(DataError, match="no row table"):
            reader.locate("p0", 0)
        assert reader.read([]).num_rows == 0


def test_locate(folder: Path) -> None:
    with open_stage(folder, "scores", Fingerprint(manifest_of(folder).fields)) as stage:
        for part in range(PARTS):
            table = pa.table(
                {
                    "prompt_id": [f"p{100 * part + i}" for i in range(ROWS)],
                    "sample_index": pa.array([0] * ROWS, pa.int32()),
                }
            )
            pq.write_table(table, folder / f"part-{part:05d}.parquet")
            stage.commit(f"part-{part:05d}.parquet", rows=ROWS)
    with TopKReader(folder, manifest_of(folder)) as reader:
        assert reader.locate("p102", 0, stop=3) == Span("part-00001.zarr", 2, 0, 3)
        with pytest.raises(DataError, match="no scores for prompt 'p102', sample 1"):
            reader.locate("p102", 1)


def test_threads_share_a_reader(folder: Path) -> None:
    whole = [read_topk(p) for p in sorted(folder.glob("*.zarr"))]
    problems: list[object] = []
    with TopKReader(folder, manifest_of(folder), memory=3000, prefetch=True) as reader:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(20):
                part, row = int(rng.integers(PARTS)), int(rng.integers(ROWS))
                reader.prefetch([f"part-{int(rng.integers(PARTS)):05d}.zarr"])
                found = reader.read([Span(f"part-{part:05d}.zarr", row)])
                if not np.array_equal(found.ids, whole[part].row(row).ids):
                    problems.append((part, row))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
