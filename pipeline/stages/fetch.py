"""Prompts from Hugging Face datasets and local files, mixed into the JSONL files that a run reads (``tropd fetch``).

A run reads files only: fetched prompts stay as they were, even if a dataset on the hub changes. Beside each file
``FILE.sources.json`` records its sources. Lines of several sources are interleaved evenly, so that any stretch of
the file, such as the first ``data.limit`` lines, holds them in about their shares.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tropd.pipeline.config.schema import to_plain
from tropd.pipeline.config.sections.data_settings import DataConfig, Source
from tropd.pipeline.problems.chat_messages import Message
from tropd.pipeline.problems.prompts import (
    MAX_SHOWN,
    Reject,
    answer_text,
    list_rejects,
    needed_text,
    prompt_text,
)
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.formats.record_fields import field_names, field_text, value_at
from tropd.storage.formats.records import Record, read_records

Ask = str | list[Message]
"""A prompt as it is written into the file: a text, or a conversation."""

# A workspace whose files were put there by hand has no such record; the files are left alone.
RECORD_SUFFIX = ".sources.json"


def fetch_sources(run: Run, sources: Sequence[Source], *, force: bool = False) -> dict[str, dict[str, Any]]:
    """Make the missing files of some sources; returns the record of each file's sources.

    Raises:
        ConfigError: the ``datasets`` library is missing, data cannot be reached, or a file was made of other sources.
        DataError: records cannot be used (``data.skip_bad`` leaves them out), or nothing is left.
    """
    data = run.config.data
    files: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        files[source.file or data.prompts].append(source)
    made = {}
    for file, parts in files.items():
        target = run.workspace.resolve(file)
        record_path = target.with_name(target.name + RECORD_SUFFIX)
        wanted = [_plain(part) for part in parts]
        if target.exists() and not force:
            made[file] = _earlier(file, record_path, wanted)
            run.reporter.info(f"fetch: {file} exists")
            continue
        lines, record = _mixed(run, file, parts, data)
        made[file] = {"sources": wanted, **record}
        write_text_atomic(target, "".join(lines))
        write_text_atomic(record_path, json.dumps(made[file], indent=1) + "\n")
        run.reporter.info(f"fetch: {file}: {record['prompts']:,} prompts")
    return made


def _plain(source: Source) -> dict[str, Any]:
    """A source for its record; ``fields``, which records have not always had, where it has some."""
    return {name: value for name, value in to_plain(source).items() if name != "fields" or value}


def _earlier(file: str, record_path: Path, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    if not record_path.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        sources = record["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{record_path}, the record of the sources of {file}, cannot be read",
            hint=f"delete it to keep {file} as it is, or make both anew with tropd fetch --force",
        ) from None
    if sources != wanted:
        raise ConfigError(
            f"{file} was made of other sources than data.sources names now ({record_path.name} has them)",
            hint="tropd fetch --force makes it anew; stages made with the old file then refuse to continue",
        )
    return record


def _mixed(
    run: Run, file: str, sources: Sequence[Source], data: DataConfig
) -> tuple[list[str], dict[str, Any]]:
    seen: set[str] = set()
    bad: list[list[Reject]] = [[] for _ in sources]
    found = [
        list(_records(run, source, _stream(run, file, source), seen, rejects))
        for source, rejects in zip(sources, bad, strict=True)
    ]
    _report_bad(run, file, sources, bad)
    for source, records in zip(sources, found, strict=True):
        if not records:
            wanted = f" with {dict(source.where)}" if source.where else ""
            raise DataError(
                f"{source.dataset} ({source.split}) has no record{wanted} that is not in the file yet"
            )
    counts = mixture([len(records) for records in found], [source.weight for source in sources])
    lines = []
    for index, number in interleaved(counts):
        source, (prompt, answer, fields) = sources[index], found[index][number]
        name = source.domain or (str(index) if len(sources) > 1 else "")
        line: dict[str, Any] = fields | {
            data.id_field: f"{name}-{number}" if name else str(number),
            data.prompt_field: prompt,
        }
        if answer is not None:
            line[data.answer_field] = answer
        if source.domain:
            line[data.domain_field] = source.domain
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    shares = [
        {"dataset": s.dataset, "domain": s.domain, "found": len(f), "prompts": n}
        for s, f, n in zip(sources, found, counts, strict=True)
    ]
    return lines, {"prompts": len(lines), "parts": shares}


def _report_bad(run: Run, file: str, sources: Sequence[Source], bad: Sequence[Sequence[Reject]]) -> None:
    """List the records that were left out."""
    if not (count := sum(map(len, bad))):
        return
    target = run.workspace.root / "rejects" / f"fetch-{Path(file).stem}.jsonl"
    lines = [
        json.dumps({"dataset": source.dataset, "line": reject.line, "reason": reject.reason}) + "\n"
        for source, rejects in zip(sources, bad, strict=True)
        for reject in rejects
    ]
    write_text_atomic(target, "".join(lines))
    run.reporter.warning(f"{file}: {count} bad record(s) of its sources left out, listed in {target}")


def mixture(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Numbers of prompts of each source that are used: all, or as many as the given shares allow."""
    if all(weight is None for weight in weights):
        return list(sizes)
    known = [1.0 if weight is None else weight for weight in weights]
    total = math.fsum(known)
    shares = [weight / total for weight in known]
    # Rounding up a little: 100 × 0.29 / 0.29 must not become 99.
    most = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [
        max(1, min(size, math.floor(share * most + 1e-9))) for size, share in zip(sizes, shares, strict=True)
    ]


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, number) of every line, each source spread evenly over the whole."""
    places = [
        ((number + 0.5) / count, index, number)
        for index, count in enumerate(counts)
        for number in range(count)
    ]
    return [(index, number) for _, index, number in sorted(places)]


def _records(
    run: Run, source: Source, records: Iterable[Record], seen: set[str], rejects: list[Reject]
) -> Iterator[tuple[Ask, str | None, dict[str, str]]]:
    """Prompt, answer and further fields of the wanted records; a prompt counts once. Others are added to ``rejects``.

    Raises:
        DataError: some are bad, and ``data.skip_bad`` is off.
    """
    taken = 0
    for record in records:
        try:
            if record.fields is None:
                raise ValueError(record.problem)
            if not _wanted(record.fields, source.where):
                continue
            text, messages = prompt_text(record.fields, source.prompt, "prompt", chat=run.config.data.chat)
            answer = None if source.answer is None else answer_text(record.fields, source.answer, "answer")
            fields = {
                name: needed_text(record.fields, column, f"fields.{name}")
                for name, column in source.fields.items()
            }
        except ValueError as error:
            rejects.append(Reject(record.number, str(error)))
            if len(rejects) == MAX_SHOWN and not run.config.data.skip_bad:
                break
            continue
        prompt: Ask = list(messages) if messages else text
        key = json.dumps(prompt)
        if key in seen:
            continue
        seen.add(key)
        yield prompt, answer, fields
        taken += 1
        if taken == source.limit:
            break
    if rejects and not run.config.data.skip_bad:
        raise DataError(
            f"{source.dataset} ({source.split}) has records that cannot be used:\n    {list_rejects(rejects, 'record')}",
            hint="name other columns in data.sources, mend them, or leave them out with --set data.skip_bad=true",
        )


def _wanted(record: Mapping[str, Any], where: Mapping[str, Sequence[str]]) -> bool:
    for path, wanted in where.items():
        value = value_at(record, path)
        if value is None and path.split(".")[0] not in record:
            raise ValueError(f"no field {path!r} for where (fields: {field_names(record)})")
        text = str(value).lower() if isinstance(value, bool) else field_text(record, path, "where")
        if text not in wanted and not (isinstance(value, bool) and str(value) in wanted):
            return False
    return True


def _stream(run: Run, file: str, source: Source) -> Iterator[Record]:
    path = run.workspace.resolve(source.dataset)
    if path.is_file():
        yield from read_records(path)
        return
    for number, fields in enumerate(_from_library(path, file, source), start=1):
        yield Record(number, fields)


def _from_library(path: Path, file: str, source: Source) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "fetching prompts needs the Hugging Face datasets library", hint='pip install "tropd[datasets]"'
        ) from None
    try:
        if (path / "dataset_dict.json").is_file():
            yield from datasets.load_from_disk(str(path))[source.split]
        elif (path / "state.json").is_file():
            yield from datasets.load_from_disk(str(path))
        else:
            name = str(path) if path.is_dir() else source.dataset
            yield from datasets.load_dataset(
                name, source.subset, split=source.split, revision=source.revision, streaming=True
            )
    except (OSError, ValueError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source.dataset} ({source.split}) cannot be read: {error}",
            hint=f"check the name and the network, or put the prompts into {file} yourself, one JSON object per line",
        ) from error
