"""Prompts from Hugging Face datasets and local files, mixed into the JSONL files that a run reads (``tropd fetch``).

A run reads files only: what was fetched stays as it was, whatever happens to a dataset on the hub. Beside each file
``FILE.sources.json`` says what it was made of. Lines of several sources are interleaved evenly, so that any stretch of
the file, such as the first ``data.limit`` lines, holds them in about their shares.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tropd.pipeline.config import DataConfig, Source, to_plain
from tropd.pipeline.context import Run
from tropd.storage.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, DataError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# A workspace whose files were put there by hand has no such record; the files are left alone.
RECORD_SUFFIX = ".sources.json"


def fetch_sources(run: Run, sources: Sequence[Source], *, force: bool = False) -> dict[str, dict[str, Any]]:
    """Make the files of some sources that are not there; returns what each file was made of.

    Raises:
        ConfigError: the ``datasets`` library is missing, data cannot be reached, or a file was made of other sources.
        DataError: a column is missing, or nothing is left.
    """
    data = run.config.data
    files: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        files[source.file or data.prompts].append(source)
    made = {}
    for file, parts in files.items():
        target = run.workspace.resolve(file)
        record_path = target.with_name(target.name + RECORD_SUFFIX)
        wanted = [to_plain(part) for part in parts]
        if target.exists() and not force:
            made[file] = _earlier(file, record_path, wanted)
            run.reporter.info(f"fetch: {file} is there")
            continue
        lines, record = _mixed(run, file, parts, data)
        made[file] = {"sources": wanted, **record}
        write_text_atomic(target, "".join(lines))
        write_text_atomic(record_path, json.dumps(made[file], indent=1) + "\n")
        run.reporter.info(f"fetch: {file}: {record['prompts']:,} prompts")
    return made


def _earlier(file: str, record_path: Path, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    if not record_path.exists():
        return {}
    record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
    if record.get("sources") != wanted:
        raise ConfigError(
            f"{file} was made of other sources than data.sources names now ({record_path.name} has them)",
            hint="tropd fetch --force makes it anew; stages made with the old file then refuse to go on",
        )
    return record


def _mixed(
    run: Run, file: str, sources: Sequence[Source], data: DataConfig
) -> tuple[list[str], dict[str, Any]]:
    seen: set[str] = set()
    found = [list(_records(run, file, source, seen)) for source in sources]
    for source, records in zip(sources, found, strict=True):
        if not records:
            raise DataError(f"{source.dataset} ({source.split}) has no record with {dict(source.where)}")
    counts = mixture([len(records) for records in found], [source.weight for source in sources])
    lines = []
    for index, number in interleaved(counts):
        source, (prompt, answer) = sources[index], found[index][number]
        name = source.domain or (str(index) if len(sources) > 1 else "")
        line = {data.id_field: f"{name}-{number}" if name else str(number), data.prompt_field: prompt}
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


def mixture(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many prompts of each source are used: all, or as many as there can be in the given shares."""
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


def _records(run: Run, file: str, source: Source, seen: set[str]) -> Iterator[tuple[str, str | None]]:
    """Prompt and answer of the records that are wanted; a prompt counts once."""
    taken = 0
    for record in _stream(run, file, source):
        if any(str(_column(record, name)) not in wanted for name, wanted in source.where.items()):
            continue
        prompt = str(_column(record, source.prompt))
        if prompt in seen or not prompt.strip():
            continue
        seen.add(prompt)
        yield prompt, None if source.answer is None else str(_column(record, source.answer))
        taken += 1
        if taken == source.limit:
            return


def _stream(run: Run, file: str, source: Source) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "fetching prompts needs the Hugging Face datasets library", hint='pip install "tropd[datasets]"'
        ) from None
    path = run.workspace.resolve(source.dataset)
    try:
        if path.is_file():
            reader = READERS.get(path.suffix)
            if reader is None:
                raise ConfigError(
                    f"{path}: what kind of file is it?", hint=f"its name has to end with {', '.join(READERS)}"
                )
            yield from datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True)
        elif (path / "dataset_dict.json").is_file():
            yield from datasets.load_from_disk(str(path))[source.split]
        elif (path / "state.json").is_file():
            yield from datasets.load_from_disk(str(path))
        else:
            name = str(path) if path.is_dir() else source.dataset
            yield from datasets.load_dataset(
                name, source.subset, split=source.split, revision=source.revision, streaming=True
            )
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source.dataset} ({source.split}) cannot be read: {error}",
            hint=f"check the name and the network, or put the prompts into {file} yourself, one JSON object per line",
        ) from error


def _column(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for step in path.split("."):
        try:
            value = value[int(step)] if step.isdigit() else value[step]
        except (KeyError, IndexError, TypeError):
            raise DataError(f"no column {path!r}; there are {', '.join(sorted(record))}") from None
    return value
