"""Records of a file that somebody made: JSON lines, one JSON array, Parquet or CSV, recognized by their content.

This is the only reader of such files. It holds one record in memory (of Parquet, a small batch), whatever the size of
the file, and never decides about a bad record: it names the fault, and continues where it can.
Text is UTF-8, or UTF-16 or UTF-32 (by a byte order mark, or by the zeros of its first characters). CSV has no mark of
its own: a file is CSV if its name ends in ``.csv``, and all of its values are text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.storage.errors import DataError

MAX_RECORD = 10_000_000
"""Most characters of a record. A longer one is passed over without being held in memory."""
MAX_SHOWN = 10_000
"""Characters of a bad record that are kept."""

FileKind = Literal["lines", "array", "parquet", "csv"]

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_UNITS: Mapping[FileKind, str] = {"lines": "line", "array": "record", "parquet": "row", "csv": "line"}
_HEAD = 4096
CHUNK = 1 << 16
_BATCH_ROWS = 64
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = "\ufeff"


@dataclass(frozen=True)
class Record:
    """One record, or the reason why it is unreadable."""

    number: int
    """From 1: the line of JSON lines and CSV (of CSV, the last of the record), else the count of the record."""
    fields: Mapping[str, Any] | None
    """Values by name. Fractions in JSON are ``Decimal``, so that no digit is lost; None if the record is bad."""
    problem: str = ""
    """Fault of a bad record."""
    text: str = ""
    """The record as it is in the file, or its beginning if it is long, with other bytes escaped. Empty for Parquet."""

    @property
    def whole(self) -> str:
        """The record as text, whatever the file was."""
        return self.text or json.dumps(self.fields, ensure_ascii=False, default=str)

    @property
    def shown(self) -> str:
        """Its beginning."""
        text = self.whole
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def record_unit(path: Path) -> str:
    """Unit of ``Record.number`` in this file: ``line``, ``record`` or ``row``.

    Raises:
        DataError: the file cannot be read, or is compressed.
    """
    return _UNITS[_kind(path, _head(path))]


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in order; blank lines are none.

    Raises:
        DataError: the file cannot be read, or not beyond some record: it is compressed, no Parquet file, no text, or
            its JSON array is broken.
    """
    head = _head(path)
    kind = _kind(path, head)
    if kind == "parquet":
        yield from _parquet_records(path)
        return
    encoding = json.detect_encoding(head)
    # Bytes that are no UTF-8 spoil their line only. Other encodings lose count there.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    readers = {"lines": _line_records, "array": _array_records, "csv": _csv_records}
    newline = "" if kind == "csv" else None
    try:
        with path.open(encoding=encoding, errors=errors, newline=newline) as stream:
            yield from readers[kind](path, stream)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding.upper()} text: {error.reason}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _kind(path: Path, head: bytes) -> FileKind:
    for mark, name in _COMPRESSED.items():
        if head.startswith(mark):
            raise DataError(f"{path} is compressed ({name})", hint="unpack it first")
    if head.startswith(b"PAR1"):
        return "parquet"
    if path.suffix.lower() == ".csv":
        return "csv"
    text = head.decode(json.detect_encoding(head), errors="ignore")
    return "array" if text.lstrip(f"{_MARK} \t\r\n").startswith("[") else "lines"


def _line_records(path: Path, stream: TextIO) -> Iterator[Record]:
    for number, line, length in _lines(stream):
        if length > MAX_RECORD:
            yield Record(number, None, _too_long(length), _escaped(line))
        elif line.strip(f"{_MARK} \t\r\n"):
            # A mark here is that of a second file, put behind the first one.
            yield _parsed(number, line.removeprefix(_MARK).rstrip("\r\n"))


def _lines(stream: TextIO) -> Iterator[tuple[int, str, int]]:
    """Number, text and length of every line; of one that is too long, only its beginning."""
    number = 0
    while line := stream.readline(MAX_RECORD + 1):
        number += 1
        start, length = line, len(line)
        if length > MAX_RECORD and not line.endswith("\n"):
            start = line[:MAX_SHOWN]
            while not line.endswith("\n") and (line := stream.readline(MAX_RECORD)):
                length += len(line)
        else:
            length = min(length, MAX_RECORD)
        yield number, start, length


def _parsed(number: int, text: str) -> Record:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        problem = (
            _no_text(text) or f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        )
        return Record(number, None, problem, _escaped(text))
    except RecursionError:
        return Record(number, None, "nested too deeply", _escaped(text))
    except ValueError as error:  # an integer of more digits than Python reads
        return Record(number, None, f"not valid JSON ({error})", _escaped(text))
    return _checked(number, value, text)


def _checked(number: int, value: Any, text: str) -> Record:
    if problem := _no_text(text):
        return Record(number, None, problem, _escaped(text))
    if not isinstance(value, dict):
        return Record(number, None, f"not a JSON object but {type(value).__name__}", text[:MAX_SHOWN])
    return Record(number, value, text=text)


def _no_text(text: str) -> str:
    """Reason why the bytes of a record are not text; empty if they are."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 text (byte {len(text[: error.start].encode()) + 1} of it)"
    return ""


def _escaped(text: str) -> str:
    """The beginning of a text, with bytes that are no text as ``\\xff``."""
    return text[:MAX_SHOWN].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _too_long(length: int) -> str:
    return f"{length:,} characters long; a record has at most {MAX_RECORD:,}"


def _fraction(text: str) -> Decimal | float:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that no Decimal has
        return float(text)


_DECODER = json.JSONDecoder(parse_float=_fraction)


class _Window:
    """A stretch of a text stream that grows as it is needed, read from ``at`` on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.text, self.at = stream, "", 0

    def grow(self, size: int) -> bool:
        """Drop the read part and add ``size`` characters; false at the end of the stream."""
        more = self._stream.read(size)
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def next_character(self) -> str:
        """The next character that is no white space, which is not yet read; nothing at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow(CHUNK):
                return ""

    def value(self) -> tuple[Any, str]:
        """The JSON value that begins here and its text.

        Raises:
            ValueError: it is none, or too long.
            RecursionError: it is nested too deeply.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                held = len(self.text) - self.at
                if held > MAX_RECORD:
                    raise ValueError(f"not valid JSON, or longer than {MAX_RECORD:,} characters") from None
                if self.grow(max(CHUNK, held)):
                    continue
                raise
            # A number at the end of the window may continue beyond it.
            if end < len(self.text) or not self.grow(CHUNK):
                text, self.at = self.text[self.at : end], end
                return value, text


def _array_records(path: Path, stream: TextIO) -> Iterator[Record]:
    window = _Window(stream)
    number = 0
    window.next_character()
    if window.text.startswith(_MARK, window.at):
        window.at += 1
        window.next_character()
    window.at += 1  # the bracket that made it an array
    following = window.next_character()
    while following != "]":
        number += 1
        try:
            value, text = window.value()
        except RecursionError:
            raise _broken(path, number, "it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise _broken(path, number, f"it is not valid JSON ({error.msg})") from None
        except ValueError as error:
            raise _broken(path, number, f"it is {error}") from None
        if len(text) > MAX_RECORD:
            yield Record(number, None, _too_long(len(text)), _escaped(text))
        else:
            yield _checked(number, value, text)
        following = window.next_character()
        if following not in ("]", ","):
            raise _broken(path, number, "no comma or bracket follows it")
        if following == ",":
            window.at += 1
            following = window.next_character()
    window.at += 1
    if window.next_character():
        raise _broken(path, number, "the array ends after it, and the file continues")


def _broken(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"{path} starts with [ and is read as one JSON array; record {number}: {problem}",
        hint="mend it there, or write one JSON object per line",
    )


def _parquet_records(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, row)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as Parquet after row {number}: {error}") from error


def _csv_records(path: Path, stream: TextIO) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD)  # Python's own limit of 131,072 is too little for a prompt
    rows = csv.reader(_whole_lines(path, stream))
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path} cannot be read as CSV: two columns have one name ({', '.join(names)})")
        first = next(rows, None)
        other = next(
            (m for m in ";\t" if len(names) == 1 and first and m in names[0] and m in first[0]), None
        )
        if other:
            shown = "tabs" if other == "\t" else f"{other!r}"
            raise DataError(
                f"{path} cannot be read as CSV: its columns seem to be separated by {shown}, not by commas",
                hint="save it with commas, or as JSON lines or Parquet",
            )
        for row in chain([] if first is None else [first], rows):
            if not row:
                continue
            text = ",".join(row)
            if len(row) != len(names):
                problem = f"{len(row)} values, where the first line names {len(names)}"
                yield Record(rows.line_num, None, problem, _escaped(text))
            elif problem := _no_text(text):
                yield Record(rows.line_num, None, problem, _escaped(text))
            else:
                # An empty cell is no value: CSV cannot tell it from an empty text.
                fields = {name: value or None for name, value in zip(names, row, strict=True)}
                yield Record(rows.line_num, fields)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV after line {rows.line_num}: {error}") from None


def _whole_lines(path: Path, stream: TextIO) -> Iterator[str]:
    for number, line, length in _lines(stream):
        if length > MAX_RECORD:
            raise DataError(f"{path} cannot be read as CSV: line {number} is {_too_long(length)}")
        yield line
