"""Statistics against a loop, exports that read back, merges that lose and invent nothing."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from storage_samples import build_workspace, tree

from tropd.storage.cache.shard import read_topk
from tropd.storage.cache.tools import cache_stats, export_datasets, export_parquet, merge_caches
from tropd.storage.errors import ConfigError, DamagedShardError, DataError, FingerprintMismatchError
from tropd.storage.formats.trajectories import read_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.stage.stage import drop_shards, open_stage
from tropd.storage.verify.verify import verify_workspace
from tropd.storage.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return build_workspace(tmp_path / "w", parts=3, rows=4)


def shards(workspace: Workspace) -> list[Path]:
    return sorted(workspace.stage("scores").glob("*.zarr"))


def test_stats_match_a_loop(workspace: Workspace) -> None:
    stats = cache_stats(workspace)
    tokens, histogram, mass, entropy = 0, {}, 0.0, 0.0
    for path in shards(workspace):
        data = read_topk(path)
        position = 0
        for token, count in enumerate(data.counts.tolist()):
            tokens += 1
            histogram[count] = histogram.get(count, 0) + 1
            logprobs = [*data.logprobs[position : position + count].astype(float), float(data.tail[token])]
            mass += sum(math.exp(v) for v in logprobs[:-1])
            entropy -= sum(math.exp(v) * v for v in logprobs if v > -math.inf)
            position += count
    size = sum(f.stat().st_size for p in shards(workspace) for f in p.rglob("*") if f.is_file())
    assert (stats.rows, stats.tokens, stats.shards, stats.bytes, stats.k) == (12, 60, 3, size, 8)
    assert stats.alternatives_histogram == dict(sorted(histogram.items()))
    assert stats.alternatives_per_token == pytest.approx(sum(n * c for n, c in histogram.items()) / tokens)
    assert stats.kept_mass == pytest.approx(mass / tokens, abs=1e-6)
    assert stats.entropy == pytest.approx(entropy / tokens, abs=1e-6)
    assert stats.dense_bytes_per_token == 8 * 6 + 4
    assert stats.compression_ratio == pytest.approx(52 * tokens / size)


def test_datasets_reads_its_export(workspace: Workspace, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    assert export_datasets(workspace, tmp_path / "out") == 12
    export_parquet(workspace, tmp_path / "same.parquet")
    loaded = datasets.load_from_disk(tmp_path / "out")
    assert loaded.to_list() == pq.read_table(tmp_path / "same.parquet").to_pylist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "same.parquet", "w"]


def test_the_datasets_export_names_its_extra(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"tropd\[datasets\]"):
        export_datasets(workspace, tmp_path / "out")


def test_export_reads_back(workspace: Workspace, tmp_path: Path) -> None:
    assert export_parquet(workspace, tmp_path / "out" / "cache.parquet") == 12
    table = pq.read_table(tmp_path / "out" / "cache.parquet").to_pylist()
    row = 0
    for path in shards(workspace):
        data = read_topk(path)
        source = list(read_trajectories(workspace.stage("prefixes") / f"{path.stem}.parquet"))
        for index, trajectory in enumerate(source):
            scored = data.row(index)
            found = table[row]
            assert (found["prompt_id"], found["sample_index"]) == (
                trajectory.prompt_id,
                trajectory.sample_index,
            )
            assert found["tokens"] == trajectory.tokens
            assert found["sampled_logprobs"] == scored.teacher_logprobs.tolist()
            assert found["tail_logprobs"] == scored.tail.tolist()
            assert [len(x) for x in found["topk_ids"]] == scored.counts.tolist()
            assert np.concatenate(found["topk_ids"]).tolist() == scored.ids.tolist()
            assert np.concatenate(found["topk_logprobs"]).tolist() == scored.logprobs.tolist()
            row += 1
    assert row == len(table)


def test_no_cache_and_damaged_cache(workspace: Workspace, tmp_path: Path) -> None:
    empty = Workspace.create(tmp_path / "empty")
    for call in (lambda: cache_stats(empty), lambda: export_parquet(empty, tmp_path / "x")):
        with pytest.raises(DataError, match="has no teacher cache"):
            call()
    file = shards(workspace)[1] / "tail" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedShardError):
        cache_stats(workspace)
    with pytest.raises(DamagedShardError):
        export_parquet(workspace, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_needs_the_trajectories_it_was_made_from(workspace: Workspace, tmp_path: Path) -> None:
    with open_stage(workspace.stage("prefixes"), "prefixes", Fingerprint({"seed": 2}), force=True) as stage:
        stage.finish()
    with pytest.raises(DataError, match="made from other trajectories"):
        export_parquet(workspace, tmp_path / "x")


def remove(workspace: Workspace, parts: list[int]) -> None:
    manifest = read_manifest(workspace.stage("scores"))
    assert manifest is not None
    names = [f"part-{part:05d}.zarr" for part in parts]
    for name in names:
        shutil.rmtree(workspace.stage("scores") / name)
    drop_shards(workspace.stage("scores"), manifest, names)


def test_merge_of_two_halves_is_the_whole(workspace: Workspace, tmp_path: Path) -> None:
    halves = []
    for name, missing in (("a", [2]), ("b", [0])):
        half = build_workspace(tmp_path / name, parts=3, rows=4)
        remove(half, missing)
        halves.append(half)
    target = Workspace.create(tmp_path / "target")
    merged = merge_caches(halves, target)
    assert not merged.complete
    whole = tree(workspace.stage("scores"))
    found = tree(target.stage("scores"))
    assert {k: v for k, v in found.items() if k != "manifest.json"} == {
        k: v for k, v in whole.items() if k != "manifest.json"
    }
    assert merge_caches([workspace], target).complete
    assert tree(target.stage("scores")) == whole
    assert verify_workspace(target) == []


def test_merge_refuses_other_settings_other_content_and_damage(workspace: Workspace, tmp_path: Path) -> None:
    target = build_workspace(tmp_path / "target", parts=3, rows=4)
    before = tree(target.root)
    manifest = read_manifest(workspace.stage("scores"))
    assert manifest is not None
    with open_stage(
        workspace.stage("scores"), "scores", Fingerprint({**manifest.fields, "scores.mass": 0.9}), force=True
    ):
        pass
    with pytest.raises(FingerprintMismatchError, match=r"scores\.mass: None → 0\.9"):
        merge_caches([workspace], target)
    assert tree(target.root) == before
    other = build_workspace(tmp_path / "other", parts=3, rows=4)
    with open_stage(other.stage("scores"), "scores", Fingerprint(manifest.fields)) as stage:
        file = stage.folder / "part-00001.zarr" / "tail" / "c" / "0"
        file.write_bytes(file.read_bytes() + b"x")
        stage.commit("part-00001.zarr", rows=4)
    with pytest.raises(DataError, match=r"part-00001\.zarr differs"):
        merge_caches([other], target)
    file.write_bytes(b"damaged")
    with pytest.raises(DamagedShardError):
        merge_caches([other], Workspace.create(tmp_path / "new"))
    with pytest.raises(DataError, match="no caches"):
        merge_caches([], target)
