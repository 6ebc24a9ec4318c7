"""SQL over a run's files: the right rows, nothing but reading, nothing outside."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_samples import build_workspace, tree

from tropd.storage.cache.shard import read_topk
from tropd.storage.catalog import EVALUATIONS, TOKENS, open_catalog, run_query
from tropd.storage.errors import DamagedShardError, DataError
from tropd.storage.formats.trajectories import SCHEMA, read_trajectories
from tropd.storage.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return build_workspace(tmp_path / "w", parts=3, rows=4)


def column(workspace: Workspace, sql: str) -> list[object]:
    return [row[0] for row in run_query(workspace, sql).rows]


def test_missing_stages_are_empty_views_with_their_columns(tmp_path: Path) -> None:
    empty = Workspace.create(tmp_path / "w")
    for view, names in {
        "prompts": ["file", "line", "prompt_id", "record"],
        "trajectories": SCHEMA.names,
        "tokens": TOKENS.names,
        "metrics": ["step"],
        "evaluations": EVALUATIONS.names,
    }.items():
        result = run_query(empty, f"select * from {view}")
        assert (result.columns, result.rows) == (names, [])


def test_trajectories_and_tokens(workspace: Workspace) -> None:
    folder = workspace.stage("prefixes")
    rows = [r for p in sorted(folder.glob("*.parquet")) for r in read_trajectories(p)]
    topk = [read_topk(p) for p in sorted(workspace.stage("scores").glob("*.zarr"))]
    assert column(workspace, "select count(*) from trajectories") == [len(rows)]
    assert column(workspace, "select meta['source'] from trajectories limit 1") == ["test"]
    assert column(workspace, "select token from tokens") == [t for r in rows for t in r.tokens]
    assert column(workspace, "select position from tokens") == [i for r in rows for i in range(len(r.tokens))]
    assert column(workspace, "select prompt_id from tokens") == [r.prompt_id for r in rows for _ in r.tokens]
    assert np.allclose(
        column(workspace, "select teacher_logprob from tokens"),
        np.concatenate([t.teacher_logprobs for t in topk]),
    )
    assert (
        column(workspace, "select num_alternatives from tokens")
        == np.concatenate([t.counts for t in topk]).tolist()
    )
    joined = "select count(*) from tokens join trajectories using (prompt_id, sample_index)"
    assert column(workspace, joined) == [sum(len(r.tokens) for r in rows)]


def test_tokens_of_unscored_shards_have_nulls(tmp_path: Path) -> None:
    half = build_workspace(tmp_path / "w", parts=2, rows=2, scored=1)
    by_part = run_query(half, "select count(*), count(teacher_logprob), count(tail_logprob) from tokens").rows
    assert by_part == [(20, 10, 10)]


def test_tokens_are_read_lazily(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counting(path: Path) -> object:
        read.append(path.name)
        return read_topk(path)

    monkeypatch.setattr("tropd.storage.catalog.read_topk", counting)
    run_query(workspace, "select count(*) from trajectories")
    assert read == []
    run_query(workspace, "select * from tokens limit 1")
    assert read == ["part-00000.zarr"]


def test_only_what_a_manifest_names_is_visible(workspace: Workspace) -> None:
    folder = workspace.stage("prefixes")
    (folder / "part-00009.parquet").write_bytes((folder / "part-00000.parquet").read_bytes())
    (folder / ".tmp-1-part-00010.parquet").write_bytes(b"half")
    assert column(workspace, "select count(*) from trajectories") == [12]


def test_missing_shard_is_an_error_not_fewer_rows(workspace: Workspace) -> None:
    (workspace.stage("prefixes") / "part-00001.parquet").unlink()
    with pytest.raises(DamagedShardError, match=r"part-00001\.parquet is missing"):
        run_query(workspace, "select count(*) from trajectories")


def test_damaged_shards_are_errors(workspace: Workspace) -> None:
    (workspace.stage("scores") / "part-00001.zarr" / "tail" / "c" / "0").write_bytes(b"?")
    with pytest.raises(DamagedShardError, match=r"part-00001\.zarr is not a readable") as caught:
        run_query(workspace, "select sum(tail_logprob) from tokens")
    assert "Traceback" not in str(caught.value)
    path = workspace.stage("prefixes") / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    with pytest.raises(DamagedShardError, match="trajectories"):
        run_query(workspace, "select * from trajectories")


def test_metrics(workspace: Workspace) -> None:
    path = workspace.stage("train") / "metrics.jsonl"
    path.parent.mkdir()
    lines = [
        {"step": 0, "loss": 1, "bins": [1, 2]},
        {"step": 1, "loss": 0.5, "entropy": None, "bins": [3, 4]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 2, "lo')
    result = run_query(workspace, "select * from metrics order by step")
    assert result.columns == ["step", "loss", "bins", "entropy"]
    assert result.rows == [(0, 1.0, [1, 2], None), (1, 0.5, [3, 4], None)]
    path.write_text('{"step": 0, "mixed": 1}\n{"step": 1, "mixed": "x"}\n[1]\n{"step": 2, "big": NaN}\n')
    assert column(workspace, "select mixed from metrics") == ["1", '"x"', None]


def test_evaluations_and_prompts(workspace: Workspace) -> None:
    from tropd.storage.stage.fingerprint import Fingerprint
    from tropd.storage.stage.stage import open_stage

    row = ["before", "greedy", "p1", 0, "r", None, "4", True, 3, "stop"]
    with open_stage(workspace.stage("eval"), "eval", Fingerprint({})) as stage:
        table = pa.table([pa.array([v], t) for v, t in zip(row, EVALUATIONS.types, strict=True)], EVALUATIONS)
        pq.write_table(table, stage.folder / "part-before.parquet")
        stage.commit("part-before.parquet", rows=1)
    assert run_query(workspace, "select * from evaluations").rows == [tuple(row)]
    (workspace.root / "data").mkdir()
    (workspace.root / "data" / "train.jsonl").write_text(
        '{"id": "a", "prompt": "1+1="}\nbad\n\n{"prompt": "x"}\n'
    )
    (workspace.root / "data" / "eval.json").write_text('[{"id": null, "prompt": "é"}]', encoding="utf-16")
    (workspace.root / "data" / "train.jsonl.sources.json").write_text("[{}]")
    pq.write_table(pa.table({"id": [7.0], "prompt": ["y"]}), workspace.root / "data" / "more.parquet")
    found = run_query(workspace, "select file, line, prompt_id, record->>'prompt' from prompts").rows
    assert found == [
        ("eval.json", 1, "1", "é"),
        ("more.parquet", 1, "7", "y"),
        ("train.jsonl", 1, "a", "1+1="),
        ("train.jsonl", 4, "4", "x"),
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "describe tokens",
        "summarize trajectories",
        "show tables",
        "explain select 1",
        "from tokens limit 1",
        "with t as (select 1) from t",
        "values (1)",
    ],
)
def test_reading_statements(workspace: Workspace, sql: str) -> None:
    assert run_query(workspace, sql).rows


WRITES = [
    "copy trajectories to '{}'",
    "copy (select 1) to '{}' (use_tmp_file false)",
    "copy (select 1) to '{}' (format parquet)",
    "attach '{}'",
    "export database '{}'",
    "create table t as select 1",
    "create view v as select 1",
    "create or replace temp view tokens as select 1",
    "drop view tokens",
    "insert into metrics values (1)",
    "delete from metrics",
    "install httpfs",
    "load httpfs",
    "load '{}'",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "set threads = 1",
    "pragma enable_profiling",
    "call checkpoint()",
    "explain analyze copy (select 1) to '{}'",
    "create secret (type s3)",
    "prepare p as copy (select 1) to '{}'",
    "select 1; copy (select 1) to '{}'",
    "begin",
    "",
    "-- nothing",
]
READS_OUTSIDE = [
    "select * from read_text('{}')",
    "select * from read_csv('{}')",
    "select * from read_blob('{}')",
    "select * from read_json('{}')",
    "select * from read_parquet('{}')",
    "select * from '{}'",
    "select * from glob('{}')",
    "select * from read_text('http://127.0.0.1:9/x')",
    "select * from query('copy (select 1) to ''{}''')",
    "select * from workspace",
]


@pytest.mark.parametrize("sql", WRITES + READS_OUTSIDE)
def test_nothing_but_reading_the_views(workspace: Workspace, tmp_path: Path, sql: str) -> None:
    shard = workspace.stage("prefixes") / "part-00000.parquet"
    before = tree(tmp_path)
    for target in (tmp_path / "out", shard):
        with pytest.raises(DataError) as caught:
            run_query(workspace, sql.format(target))
        assert caught.value.hint
    assert tree(tmp_path) == before


@pytest.mark.parametrize("sql", WRITES + READS_OUTSIDE)
def test_the_bare_connection_reaches_no_file_either(workspace: Workspace, tmp_path: Path, sql: str) -> None:
    before = tree(tmp_path)
    connection = open_catalog(workspace)
    for target in (tmp_path / "out", workspace.stage("prefixes") / "part-00000.parquet"):
        try:
            connection.execute(sql.format(target))
        except (duckdb.Error, RuntimeError):
            continue
        assert "'{}'" not in sql
    connection.close()
    assert tree(tmp_path) == before


def test_wrong_sql_says_what_exists(workspace: Workspace) -> None:
    with pytest.raises(DataError, match="nonsense"):
        run_query(workspace, "select nonsense from tokens")
    with pytest.raises(DataError, match="query failed") as caught:
        run_query(workspace, "selec 1")
    assert "trajectories" in str(caught.value)
