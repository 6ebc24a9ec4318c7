"""The ragged top-k cache against a loop over tokens, and against damage."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from storage_samples import distributions, topk_of, trajectory

from tropd.storage.cache.shard import TopK, check_invariants, concatenate, prune, read_topk, write_topk
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError


def assert_same(one: TopK, other: TopK) -> None:
    for field in dataclasses.fields(TopK):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert left.dtype == right.dtype, field.name
        assert np.array_equal(left, right), field.name


def leading(full: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-full, axis=1, kind="stable")[:, :k].astype(np.int32)
    return order, np.take_along_axis(full, order, axis=1)


@settings(max_examples=80, deadline=None)
@example(lengths=[4, 6, 6], k=2, mass=1.0, seed=539)  # 1 + p - p is less than 1
@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    k=st.integers(1, 12),
    mass=st.sampled_from([0.3, 0.9, 0.99, 0.999, 1.0]),
    seed=st.integers(0, 1000),
)
def test_prune_matches_a_loop(lengths: list[int], k: int, mass: float, seed: int) -> None:
    full = distributions(np.random.default_rng(seed), sum(lengths))
    ids, logprobs = leading(full, k)
    data = prune(ids, logprobs, full[:, 0], lengths, mass=mass)
    assert check_invariants(data, vocab_size=full.shape[1]) == []
    assert np.diff(data.offsets).tolist() == lengths
    position = 0
    for token in range(sum(lengths)):
        kept, total = [], 0.0
        for column in range(k):
            if total >= mass:
                break
            value = np.float16(logprobs[token, column])
            kept.append((int(ids[token, column]), float(value)))
            total += float(np.exp(np.float64(value)))
        count = int(data.counts[token])
        stored = slice(position, position + count)
        assert list(zip(data.ids[stored].tolist(), data.logprobs[stored].tolist(), strict=True)) == sorted(
            kept, key=lambda pair: (-pair[1], pair[0])
        )
        assert np.exp(np.float64(data.tail[token])) == pytest.approx(max(0.0, 1.0 - total), abs=1e-6)
        position += count


def test_prune_refuses_nonsense() -> None:
    ids, logprobs = leading(distributions(np.random.default_rng(0), 3), 4)
    sampled = logprobs[:, 0]
    for column in range(4):
        bad = logprobs.copy()
        bad[1, column] = np.nan
        with pytest.raises(ValueError, match="NaN or positive"):
            prune(ids, bad, sampled, [3], mass=0.9)
    with pytest.raises(ValueError, match="NaN or positive"):
        prune(ids, logprobs, np.array([0.0, 2.0, 0.0], dtype=np.float32), [3], mass=0.9)
    with pytest.raises(ValueError, match="not descending"):
        prune(ids, logprobs[:, ::-1].copy(), sampled, [3], mass=0.9)
    with pytest.raises(ValueError, match="do not fit"):
        prune(ids, logprobs, sampled, [2], mass=0.9)
    with pytest.raises(ValueError, match="do not fit"):
        prune(ids[:, :3], logprobs, sampled, [3], mass=0.9)


def test_impossible_alternatives_are_not_kept() -> None:
    logprobs = np.array([[0.0, -np.inf, -np.inf]], dtype=np.float32)
    data = prune(np.array([[5, 6, 7]], dtype=np.int32), logprobs, logprobs[:, 1], [1], mass=1.0)
    assert data.ids.tolist() == [5]
    assert data.tail.tolist() == [-np.inf]
    assert data.teacher_logprobs.tolist() == [-np.inf]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=5), seed=st.integers(0, 100))
def test_round_trip_and_rows(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int) -> None:
    rows = [trajectory(seed + i, num_tokens=n) for i, n in enumerate(lengths)]
    data = topk_of(rows, seed=seed)
    path = tmp_path_factory.mktemp("z") / "part-00000.zarr"
    write_topk(path, data, precision="q8")
    assert np.array_equal(read_topk(path).counts, data.counts)
    write_topk(path, data)
    stored = read_topk(path)
    assert_same(stored, data)
    if rows:
        assert_same(concatenate([stored.row(i) for i in range(len(rows))]), data)
    for index, length in enumerate(lengths):
        part = stored.row(index, stop=3)
        assert part.num_tokens == min(3, length)
        assert check_invariants(part) == []


def test_concatenate_nothing() -> None:
    assert_same(concatenate([]), topk_of([]))


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    from storage_samples import tree

    rows = [trajectory(i) for i in range(5)]
    for name in "ab":
        write_topk(tmp_path / name / "part", topk_of(rows))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


BROKEN = {
    "offsets end at": lambda d: dataclasses.replace(d, offsets=d.offsets[:-1]),
    "do not start at 0 and rise": lambda d: dataclasses.replace(d, offsets=d.offsets[::-1].copy()),
    "ids has": lambda d: dataclasses.replace(d, ids=d.ids[1:]),
    "tail has": lambda d: dataclasses.replace(d, tail=d.tail[1:]),
    "outside the vocabulary": lambda d: dataclasses.replace(d, ids=d.ids - 100),
    "NaN or positive": lambda d: dataclasses.replace(
        d, teacher_logprobs=d.teacher_logprobs * np.float32("nan")
    ),
    "not descending": lambda d: dataclasses.replace(d, logprobs=d.logprobs[::-1].copy()),
    "add up to 1": lambda d: dataclasses.replace(d, tail=d.tail * 0),
}


@pytest.mark.parametrize("words", BROKEN)
def test_invariants(tmp_path: Path, words: str) -> None:
    data = topk_of([trajectory(i) for i in range(3)])
    assert check_invariants(data) == []
    broken = BROKEN[words](data)
    assert any(words in problem for problem in check_invariants(broken))
    with pytest.raises(ValueError, match=f"is not written: .*{words}"):
        write_topk(tmp_path / "z", broken)
    assert not (tmp_path / "z").exists()


def test_ids_beyond_the_vocabulary() -> None:
    data = topk_of([trajectory(1)])
    assert check_invariants(data, vocab_size=int(data.ids.max()) + 1) == []
    assert check_invariants(data, vocab_size=int(data.ids.max())) == ["ids lie outside the vocabulary"]


def test_truncated_or_missing_files_are_refused(tmp_path: Path) -> None:
    data = topk_of([trajectory(i) for i in range(3)])
    path = tmp_path / "z"
    write_topk(path, data)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        good = file.read_bytes()
        for length in {0, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:length])
            with pytest.raises((DamagedShardError, WorkspaceVersionError)):
                read_topk(path)
        file.unlink()
        with pytest.raises((DamagedShardError, WorkspaceVersionError)):
            read_topk(path)
        file.write_bytes(good)
    assert_same(read_topk(path), data)


def test_bit_flips_in_data_are_refused(tmp_path: Path) -> None:
    """Every chunk has its own checksum; flips in Zarr's JSON are the manifest's to find."""
    path = tmp_path / "z"
    data = topk_of([trajectory(i) for i in range(3)])
    write_topk(path, data)
    rng = random.Random(0)
    chunks = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")
    metadata = sorted(path.rglob("zarr.json"))
    assert (len(chunks), len(metadata)) == (7, 8)
    for file in chunks * 25 + metadata * 8:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        if file in chunks:
            with pytest.raises(DamagedShardError, match="not a readable"):
                read_topk(path)
        else:
            with contextlib.suppress(DamagedShardError, WorkspaceVersionError):
                read_topk(path)
        file.write_bytes(good)


def test_newer_version_names_both(tmp_path: Path) -> None:
    import zarr

    write_topk(tmp_path / "z", topk_of([trajectory(1)]))
    zarr.open_group(tmp_path / "z", mode="a").attrs["tropd.schema_version"] = 9
    with pytest.raises(WorkspaceVersionError, match="version 9; this tropd reads version 2"):
        read_topk(tmp_path / "z")
    with pytest.raises(DamagedShardError, match="absent is not a readable"):
        read_topk(tmp_path / "absent")
