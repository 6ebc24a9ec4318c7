"""Problems from the Hugging Face hub, or from a directory in its format, as the JSONL files that a run reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tropd.storage.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """A file of a run, and where its lines come from."""

    file: str
    """Relative to the workspace."""
    dataset: str
    """Name on the hub, or a local directory."""
    split: str
    prompt: str
    """Column with the prompt; dots lead into lists and objects: ``conversations.0.value``."""
    answer: str | None = None
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Only records whose column has one of these values."""
    limit: int | None = None


# Names and columns as of the datasets' pages on the hub; a column that is not there is reported with those that are.
EVALUATIONS = (
    Source("data/aime24.jsonl", "HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    Source("data/aime25.jsonl", "math-ai/aime25", "test", "problem", "answer"),
    Source("data/amc23.jsonl", "math-ai/amc23", "test", "question", "answer"),
)


def training_source(domains: Sequence[str], limit: int | None) -> Source:
    """OpenThoughts3's prompts of some domains."""
    return Source(
        "data/train.jsonl",
        "open-thoughts/OpenThoughts3-1.2M",
        "train",
        "conversations.0.value",
        where={"domain": domains},
        limit=limit,
    )


def fetch(source: Source, root: Path) -> int:
    """Write a source's file unless it is there; returns its lines (0 if it was there).

    Repeated prompts are left out: OpenThoughts3 has several answers to each.

    Raises:
        ConfigError: the ``datasets`` library is missing, or the data cannot be reached.
        DataError: a column is missing, or nothing matches.
    """
    target = root / source.file
    if target.exists():
        return 0
    records: list[str] = []
    seen: set[str] = set()
    for record in _stream(source):
        if any(str(_column(record, name)) not in wanted for name, wanted in source.where.items()):
            continue
        prompt = str(_column(record, source.prompt))
        if prompt in seen:
            continue
        seen.add(prompt)
        line: dict[str, Any] = {"id": str(len(records)), "prompt": prompt}
        if source.answer is not None:
            line["answer"] = str(_column(record, source.answer))
        records.append(json.dumps(line, ensure_ascii=False))
        if len(records) == source.limit:
            break
    if not records:
        raise DataError(f"{source.dataset} ({source.split}) has no record with {dict(source.where)}")
    write_text_atomic(target, "\n".join(records) + "\n")
    return len(records)


def _stream(source: Source) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "fetching problems needs the Hugging Face datasets library", hint='pip install "tropd[datasets]"'
        ) from None
    try:
        yield from datasets.load_dataset(source.dataset, split=source.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source.dataset} ({source.split}) cannot be read: {error}",
            hint=f"check the network, or put the problems into {source.file} yourself (id, prompt, answer)",
        ) from error


def _column(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for step in path.split("."):
        try:
            value = value[int(step)] if step.isdigit() else value[step]
        except (KeyError, IndexError, TypeError):
            raise DataError(f"no column {path!r}; there are {', '.join(sorted(record))}") from None
    return value
