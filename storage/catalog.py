"""The catalog: a run's files as SQL views (DuckDB in memory, read-only).

============= ==================================================================== =======================
view          columns                                                              from
============= ==================================================================== =======================
prompts       file, line, prompt_id, record (its JSON: record->>'prompt')          data/\\*, prompt files
trajectories  as in ``trajectories.SCHEMA``                                        prefixes/\\*.parquet
tokens        prompt_id, sample_index, position, token, sampled_logprob (of the    prefixes/\\*.parquet,
              model that sampled), teacher_logprob, num_alternatives,              scores/\\*.zarr
              tail_logprob (null where the teacher has not scored yet)
metrics       step and whatever numbers the trainer recorded                       train/metrics.jsonl
evaluations   as in ``EVALUATIONS``                                                eval/\\*/part-\\*.parquet
distances     as in ``DISTANCES``: a row per prompt, means over its tokens         eval/distance-\\*.parquet
============= ==================================================================== =======================

Only shards that a manifest names are visible; a stage that has not run gives an empty view. Views are Arrow
streams made anew for every scan: nothing is read before a query asks for it, and tables larger than memory
pass through in batches. DuckDB itself may open no file at all, so that no SQL can read or write outside.
This module neither checks checksums (``verify`` does) nor keeps anything between two queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tropd.storage.cache.shard import read_topk
from tropd.storage.errors import DamagedShardError, DataError, TropdError
from tropd.storage.formats.record_fields import field_text
from tropd.storage.formats.records import read_records
from tropd.storage.formats.step_log import read_log
from tropd.storage.formats.trajectories import SCHEMA as TRAJECTORIES
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import METRICS, Workspace

PROMPTS = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("prompt_id", pa.string()), ("record", pa.string())]
)
TOKENS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("sampled_logprob", pa.float32()),
        ("teacher_logprob", pa.float32()),
        ("num_alternatives", pa.int32()),
        ("tail_logprob", pa.float32()),
    ]
)
EVALUATIONS = pa.schema(
    [
        ("who", pa.string()),
        ("mode", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("response", pa.string()),
        ("answer", pa.string()),
        ("expected", pa.string()),
        ("correct", pa.bool_()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)
DISTANCES = pa.schema(
    [
        ("who", pa.string()),
        ("prompt_id", pa.string()),
        ("student_tokens", pa.int32()),
        ("student_finish_reason", pa.string()),
        ("reverse_kl", pa.float64()),
        ("acceptance", pa.float64()),
        ("student_entropy", pa.float64()),
        ("teacher_tokens", pa.int32()),
        ("teacher_finish_reason", pa.string()),
        ("forward_kl", pa.float64()),
        ("teacher_entropy", pa.float64()),
        ("method", pa.string()),
    ]
)
"""Distances of a student (before or after training) to the teacher on a held-out prompt: means over a response."""
_LINES_PER_BATCH = 4096
DISTANCE, RESPONSES = "distance-", "responses-"
"""Beginnings of file names in eval/: distances per prompt, and the responses that they were measured on."""
_PROMPT_FILES = {".jsonl", ".json", ".parquet", ".csv"}
_ABOUT = ".sources.json"
"""Ending of the names of files that list a prompt file's sources."""
_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_LOCK_DOWN = """
    SET autoinstall_known_extensions = false;
    SET autoload_known_extensions = false;
    SET python_enable_replacements = false;
    SET temp_directory = '';
    SET enable_external_access = false;
    SET lock_configuration = true;
"""


@dataclass(frozen=True)
class QueryResult:
    """Column names and rows of a query, in its order."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


class _Lazy:
    """An Arrow table that is produced anew for each scan (Arrow's PyCapsule interface)."""

    def __init__(
        self, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]], failures: list[TropdError]
    ) -> None:
        self.schema = schema
        self._batches = batches
        self._failures = failures

    def _kept(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches()
        except TropdError as error:  # DuckDB would turn it into a text with a traceback in it
            self._failures.append(error)
            raise

    def __arrow_c_schema__(self) -> object:
        return self.schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        reader = pa.RecordBatchReader.from_batches(self.schema, self._kept())
        return reader.__arrow_c_stream__(requested_schema)


def open_catalog(workspace: Workspace) -> duckdb.DuckDBPyConnection:
    """A connection with the six views and no access to any file; close it after use.

    Raises:
        DamagedShardError: a manifest is damaged, or a shard that it names is missing.
    """
    return _open(workspace, [])


def _open(workspace: Workspace, failures: list[TropdError]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    try:
        connection.register("prompts", _Lazy(PROMPTS, lambda: _prompts(workspace.root / "data"), failures))
        connection.register("trajectories", _dataset(workspace.stage("prefixes"), TRAJECTORIES))
        connection.register("tokens", _Lazy(TOKENS, lambda: _tokens(workspace), failures))
        connection.register("metrics", _metrics(workspace.stage("train") / METRICS))
        connection.register("evaluations", _dataset(workspace.stage("eval"), EVALUATIONS, "part-"))
        connection.register("distances", _dataset(workspace.stage("eval"), DISTANCES, DISTANCE))
        connection.execute(_LOCK_DOWN)
    except BaseException:
        connection.close()
        raise
    return connection


def run_query(workspace: Workspace, sql: str) -> QueryResult:
    """Answer one SELECT (or DESCRIBE, SUMMARIZE, SHOW, EXPLAIN).

    Raises:
        DataError: the SQL is wrong, is not one statement, or does anything but read.
        DamagedShardError: a file that the query needs is missing or unreadable.
    """
    failures: list[TropdError] = []
    connection = _open(workspace, failures)
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type not in _READING:
            kinds = ", ".join(s.type.name for s in statements) or "nothing"
            raise DataError(
                f"a query is one SELECT; this is {kinds}",
                hint="the catalog only reads; redirect --json output to keep a result",
            )
        cursor = connection.execute(statements[0])
        return QueryResult(columns=[c[0] for c in cursor.description], rows=cursor.fetchall())
    except duckdb.Error as error:
        if failures:
            raise failures[0] from None
        if "reading the stream registered as" in str(
            error
        ):  # how DuckDB introduces what Arrow could not read
            raise DamagedShardError(
                f"the query failed: {error}", hint="tropd verify finds the damage"
            ) from None
        raise DataError(
            f"the query failed: {error}",
            hint="views: prompts, trajectories, tokens, metrics, evaluations, distances; DESCRIBE tokens lists columns",
        ) from None
    finally:
        connection.close()


def _shards(folder: Path, suffix: str) -> list[Path]:
    """The shards of a stage in manifest order; a missing one must not look like fewer rows."""
    manifest = read_manifest(folder)
    paths = [folder / name for name in (manifest.shards if manifest else {}) if name.endswith(suffix)]
    for path in paths:
        if not path.exists():
            raise DamagedShardError(
                f"{path} is missing, but its manifest lists it", hint="tropd verify finds the damage"
            )
    return paths


def _dataset(folder: Path, schema: pa.Schema, prefix: str = "") -> Any:
    # An empty list of files would need a file system to guess from; an empty table needs nothing.
    if not (files := [str(path) for path in _shards(folder, ".parquet") if path.name.startswith(prefix)]):
        return schema.empty_table()
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    return ds.dataset(
        files, schema=schema, format=ds.ParquetFileFormat(default_fragment_scan_options=options)
    )


def _prompts(folder: Path) -> Iterator[pa.RecordBatch]:
    files = [p for p in sorted(folder.glob("*")) if p.suffix in _PROMPT_FILES and not p.name.endswith(_ABOUT)]
    for path in files:
        rows: list[dict[str, Any]] = []
        for record in read_records(path):
            if record.fields is None:
                continue
            try:
                name = field_text(record.fields, "id", "")
            except ValueError:
                name = None
            rows.append(
                {
                    "file": path.name,
                    "line": record.number,
                    "prompt_id": str(record.number) if name is None else name,
                    "record": record.whole,
                }
            )
            if len(rows) == _LINES_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, schema=PROMPTS)
                rows = []
        yield pa.RecordBatch.from_pylist(rows, schema=PROMPTS)


def _metrics(path: Path) -> pa.Table:
    """One row per complete line; a torn last line (the trainer was killed) is not a step yet."""
    records = read_log(path).whole
    names = dict.fromkeys(["step", *(name for record in records for name in record)])
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns[name] = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # integers and fractions mixed, or no numbers at all
            numeric = all(v is None or isinstance(v, int | float) for v in values)
            columns[name] = pa.array(
                [None if v is None else float(v) if numeric else json.dumps(v) for v in values]
            )
        if pa.types.is_null(columns[name].type):
            columns[name] = columns[name].cast(pa.int64() if name == "step" else pa.float64())
    return pa.table(columns)


def _tokens(workspace: Workspace) -> Iterator[pa.RecordBatch]:
    scored = {path.stem: path for path in _shards(workspace.stage("scores"), ".zarr")}
    wanted = ["prompt_id", "sample_index", "tokens", "sampled_logprobs"]
    for path in _shards(workspace.stage("prefixes"), ".parquet"):
        topk = read_topk(scored[path.stem]) if path.stem in scored else None
        first = 0
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            for batch in parquet.iter_batches(columns=wanted):
                lengths = batch["tokens"].value_lengths().to_numpy()
                rows = np.repeat(np.arange(len(lengths)), lengths)
                last = first + len(rows)
                if topk is not None and last > topk.num_tokens:
                    raise DamagedShardError(
                        f"{scored[path.stem]} has {topk.num_tokens} tokens, {path} has more",
                        hint="tropd verify finds the damage",
                    )
                starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
                nothing = pa.nulls(len(rows))
                yield pa.RecordBatch.from_arrays(
                    [
                        batch["prompt_id"].take(pa.array(rows)),
                        batch["sample_index"].take(pa.array(rows)),
                        pa.array(np.arange(len(rows)) - starts, pa.int32()),
                        batch["tokens"].flatten(),
                        batch["sampled_logprobs"].flatten(),
                        pa.array(topk.teacher_logprobs[first:last]) if topk else nothing.cast(pa.float32()),
                        pa.array(topk.counts[first:last], pa.int32()) if topk else nothing.cast(pa.int32()),
                        pa.array(topk.tail[first:last]) if topk else nothing.cast(pa.float32()),
                    ],
                    schema=TOKENS,
                )
                first = last
