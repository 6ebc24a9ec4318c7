"""Manifests: exact round trips, and no damage to them goes unnoticed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tropd.storage.errors import DamagedShardError, TropdError, WorkspaceVersionError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import (
    Manifest,
    Shard,
    check_shard,
    describe_shard,
    read_manifest,
    write_manifest,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


def sample(folder: Path) -> Manifest:
    (folder / "part-00000.parquet").write_bytes(b"content")
    shard = describe_shard(folder, "part-00000.parquet", rows=3)
    fingerprint = Fingerprint({"seed": 1, "temperature": 1e-05, "model": "ab"})
    return Manifest.start("prefixes", fingerprint).model_copy(
        update={"shards": {shard.name: shard}, "complete": True, "summary": {"rate": 2.5e-07, "rows": 3}}
    )


@settings(max_examples=50)
@given(
    fields=st.dictionaries(st.text(max_size=5), scalars, max_size=4),
    summary=st.dictionaries(st.text(max_size=5), json_values, max_size=4),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, fields: dict, summary: dict) -> None:
    folder = tmp_path_factory.mktemp("m")
    fingerprint = Fingerprint(fields)
    write_manifest(folder, Manifest.start("s", fingerprint).model_copy(update={"summary": summary}))
    loaded = read_manifest(folder)
    assert loaded is not None
    assert loaded.summary == summary
    assert Fingerprint(loaded.fields).digest == fingerprint.digest == loaded.fingerprint


def test_infinity_and_nan_survive(tmp_path: Path) -> None:
    manifest = Manifest.start("s", Fingerprint({"clip": math.inf}))
    write_manifest(tmp_path, manifest.model_copy(update={"summary": {"loss": math.nan}}))
    loaded = read_manifest(tmp_path)
    assert loaded is not None
    assert loaded.fields == {"clip": math.inf}
    assert math.isnan(loaded.summary["loss"])


def test_absent_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, sample(tmp_path))
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for position in range(len(good) * 8):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(TropdError):
            read_manifest(tmp_path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, sample(tmp_path))
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedShardError, match=r"manifest\.json"):
            read_manifest(tmp_path)


def test_edited_by_hand(tmp_path: Path) -> None:
    write_manifest(tmp_path, sample(tmp_path))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 3', '"rows": 4', 1))
    with pytest.raises(DamagedShardError, match="changed after it was written"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"schema_version": 1}', "{", "\ufeff{}"])
def test_malformed(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DamagedShardError, match="not a readable manifest"):
        read_manifest(tmp_path)


def test_not_a_file_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DamagedShardError):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").rmdir()
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedShardError):
        read_manifest(tmp_path)


def test_newer_version_names_both(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 7, "unknown": []}))
    with pytest.raises(WorkspaceVersionError, match="schema version 7; this tropd reads version 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "manifest.json",
        ".tmp-1-x",
        "a/.tmp-x",
        "a//b",
        "./a",
        "a/",
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Shard(name=name, rows=0, size=0, sha256="")


def test_key_must_be_the_name() -> None:
    shard = Shard(name="a", rows=0, size=0, sha256="")
    with pytest.raises(ValidationError, match="listed as 'b'"):
        Manifest(stage="s", fingerprint="", fields={}, shards={"b": shard})


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_check_shard_finds_damage(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "part" if kind == "file" else tmp_path / "part" / "c" / "0"
    path.parent.mkdir(parents=True, exist_ok=True)
    good = random.Random(0).randbytes(300)
    path.write_bytes(good)
    shard = describe_shard(tmp_path, "part", rows=1)
    check_shard(tmp_path, shard)
    for position in range(0, 2400, 7):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedShardError, match="sha256"):
            check_shard(tmp_path, shard)
    path.write_bytes(good[:-1])
    with pytest.raises(DamagedShardError, match="299 bytes, its manifest says 300"):
        check_shard(tmp_path, shard)
    path.unlink()
    with pytest.raises(DamagedShardError, match=r"is missing|0 bytes"):
        check_shard(tmp_path, shard)


def test_unreadable_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(b"x")
    shard = describe_shard(tmp_path, "part", rows=1)

    def failing(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tropd.storage.stage.manifest.content_digest", failing)
    with pytest.raises(DamagedShardError, match=r"part cannot be read: \[Errno 5\]"):
        check_shard(tmp_path, shard)
