"""Files of records of every kind and encoding; what cannot be read is named, and costs neither time nor memory."""

from __future__ import annotations

import codecs
import json
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tropd.storage.errors import DataError
from tropd.storage.formats import records
from tropd.storage.formats.records import read_records, record_unit

ROWS = [{"id": "a", "prompt": "größer? 漢字 😀"}, {"id": "b", "prompt": "1+1="}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def fields(path: Path) -> list[Any]:
    return [record.fields for record in read_records(path)]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.replace("\n", "\r\n").encode(),
        codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + LINES.replace("\n", "\r\n").encode("utf-16-be"),
        LINES.encode("utf-16-le"),
        codecs.BOM_UTF8 + LINES.replace('\n{"id": "b"', '\n\ufeff{"id": "b"').encode(),
        json.dumps(ROWS).encode(),
        codecs.BOM_UTF8 + b"\r\n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(),
        json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    ],
)
def test_encodings_and_line_ends_of_every_kind(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "p.txt").write_bytes(content)
    assert fields(path) == ROWS


def test_parquet_and_csv(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path := tmp_path / "p.jsonl")
    assert fields(path) == ROWS
    assert record_unit(path) == "row"
    (path := tmp_path / "p.csv").write_text('\ufeffid,prompt\r\na,"two\r\nlines"\r\n\r\nb,\r\nc\r\n')
    found = list(read_records(path))
    assert [(r.number, r.fields) for r in found[:2]] == [
        (3, {"id": "a", "prompt": "two\r\nlines"}),
        (5, {"id": "b", "prompt": None}),
    ]
    assert (found[2].number, found[2].problem) == (6, "1 values, where the first line names 2")


def test_lines_are_counted_as_an_editor_does_and_digits_are_kept(tmp_path: Path) -> None:
    (path := tmp_path / "p").write_text(
        '\n{"a": 3.14159265358979323846}\n  \n{"a": NaN, "b": 1e999999999999999999999}\n'
    )
    found = list(read_records(path))
    assert [r.number for r in found] == [2, 4]
    assert found[0].fields == {"a": Decimal("3.14159265358979323846")}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "\xff"}', "not UTF-8 text (byte 8 of it)"),
        (b'{"a": ', "not valid JSON (Expecting value at column 7)"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit", id="digits"),
        (b'"x"', "not a JSON object but str"),
    ],
)
def test_a_bad_line_spoils_nothing_else(tmp_path: Path, line: bytes, problem: str) -> None:
    (path := tmp_path / "p").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    found = list(read_records(path))
    assert [r.fields for r in found] == [{"a": 1}, None, {"a": 3}]
    assert found[1].problem.startswith(problem)
    assert len(found[1].text) <= records.MAX_SHOWN


def test_a_huge_line_is_passed_over_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 100_000)
    line = '{"a": "' + "x" * 20_000_000 + '"}\n'
    (path := tmp_path / "p").write_text(line + '{"a": 2}\n' + line.strip())
    tracemalloc.start()
    try:
        found = list(read_records(path))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert [(r.number, r.fields) for r in found] == [(1, None), (2, {"a": 2}), (3, None)]
    assert found[0].problem == "20,000,010 characters long; a record has at most 100,000"
    assert len(found[0].shown) < 20_000


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", 7)
    rows = [{"n": n, "text": "[}," * n} for n in range(30)]
    (path := tmp_path / "p").write_text(json.dumps(rows, indent=1))
    assert fields(path) == rows
    assert record_unit(path) == "record"
    (path := tmp_path / "q").write_bytes(b'[{"a": 1}, 1234567890, {"a": "\xff"}, []]')
    assert [(r.number, r.problem) for r in read_records(path)] == [
        (1, ""),
        (2, "not a JSON object but int"),
        (3, "not UTF-8 text (byte 8 of it)"),
        (4, "not a JSON object but list"),
    ]
    (path := tmp_path / "r").write_text(" [ ] ")
    assert fields(path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1}, {"a": ', "record 2: it is not valid JSON"),
        (b'[{"a": 1} {"a": 2}]', "record 1: no comma or bracket follows"),
        (b'[{"a": 1}]\n[{"a": 2}]', "record 1: the array ends after it"),
        pytest.param(b"[" * 100_000, "record 1: it is nested too deeply", id="deep"),
        pytest.param(b'["' + b"x" * 200_000, "longer than 100,000 characters", id="long"),
        (codecs.BOM_UTF16_LE + "{}\n".encode("utf-16-le") + b"x", "is not UTF-16 text"),
        (b"PAR1 and nothing else", "cannot be read as Parquet"),
        (b"\x1f\x8b\x08", "is compressed (gzip)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 100_000)
    (path := tmp_path / "p").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path / "none"))
