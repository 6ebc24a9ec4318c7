"""Prompts that a program hands over as values, written to a file of the workspace as ordinary records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tropd.pipeline.problems.chat_messages import is_messages
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, DataError

Given = str | Mapping[str, Any] | list[Mapping[str, Any]]
"""A prompt: a text, a record with the fields that [data] names, or the messages of a conversation."""


def records(prompts: Iterable[Given], name: str) -> list[dict[str, Any]]:
    """The records of prompts: a text or a conversation becomes one with ``id`` and ``prompt``.

    Args:
        prompts: an iterable, such as a list or a ``datasets.Dataset``.
        name: of the argument, for errors.

    Raises:
        ConfigError: it is not a collection of prompts, or empty.
        DataError: one of them is nothing that a prompt could be.
    """
    if isinstance(prompts, Mapping):
        splits = ", ".join(map(str, list(prompts)[:5]))
        raise ConfigError(
            f"{name} is a {type(prompts).__name__} with {splits}, not a collection of prompts",
            hint=f'name one of its splits, such as {name}=dataset["train"], or put one record into a list',
        )
    found = [_record(number, prompt, name) for number, prompt in enumerate(prompts)]
    if not found:
        raise ConfigError(f"{name} is empty")
    return found


def _record(number: int, prompt: Any, name: str) -> dict[str, Any]:
    if isinstance(prompt, str) or is_messages(prompt):
        return {"id": str(number), "prompt": prompt}
    if isinstance(prompt, Mapping) and "role" in prompt and "content" in prompt and "prompt" not in prompt:
        raise DataError(
            f"{name}[{number}] is a message, not a prompt",
            hint="a conversation is a list of messages, and prompts are a list of conversations: [[{…}, {…}], …]",
        )
    if isinstance(prompt, Mapping):
        return dict(prompt)
    raise DataError(
        f"{name}[{number}] is a {type(prompt).__name__}",
        hint="a prompt is a text, a list of messages, or a dictionary with the fields that data.prompt_field and "
        "data.answer_field name",
    )


def write_records(
    found: Sequence[Mapping[str, Any]], path: Path, name: str, *, used_by: Path | None = None
) -> None:
    """Write records as JSON lines. A file that holds the same records already is left alone.

    Args:
        name: as of ``records``.
        used_by: folder of a stage that was made with the existing records, which then stay.

    Raises:
        DataError: a value that JSON does not have, or other records than the stage was made with.
    """
    lines = []
    for number, record in enumerate(found):
        try:
            lines.append(json.dumps(record, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}[{number}] cannot be written as JSON: {error}") from error
    before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines == before:
        return
    if before and used_by is not None:
        common = zip(lines, before, strict=False)
        first = next(
            (i for i, (ours, theirs) in enumerate(common) if ours != theirs), min(len(lines), len(before))
        )
        raise DataError(
            f"{name} has other records than {path}, which {used_by} was made with: {len(lines)} instead of "
            f"{len(before)}, and the first that differs is {name}[{first}]",
            hint="name another workspace for them, or remove that folder to make it anew",
        )
    write_text_atomic(path, "".join(lines))
