"""Reading prompts: JSONL files, checked line by line before any model is loaded.

A line that cannot be used is a ``Reject`` with its number and a reason. Whoever reads decides what that means:
``refuse`` stops with all of them named, ``write_rejects`` puts them into a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tropd.pipeline.config import DataConfig
from tropd.storage.atomic import write_text_atomic
from tropd.storage.errors import DataError

MAX_SHOWN = 10


@dataclass(frozen=True)
class Prompt:
    """One problem. ``answer`` is None where the file gives none."""

    id: str
    text: str
    answer: str | None
    domain: str = ""
    """What it is about, where the file says so."""
    line: int = field(default=0, compare=False)
    """Where it is in its file, counted from 1."""


@dataclass(frozen=True)
class Reject:
    """A line that cannot be used."""

    line: int
    reason: str


def scan_prompts(
    path: Path, config: DataConfig, *, need_answer: bool = False
) -> tuple[list[Prompt], list[Reject]]:
    """The usable prompts of a JSONL file, and its bad lines.

    Raises:
        DataError: the file is missing or has no lines.
    """
    if not path.is_file():
        raise DataError(
            f"prompt file {path} does not exist",
            hint="set data.prompts / data.evaluation; for the demo recipes run tropd prepare first",
        )
    prompts: list[Prompt] = []
    rejects: list[Reject] = []
    seen: dict[str, int] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                prompt = _parse(line, number, config, need_answer)
            except ValueError as error:
                rejects.append(Reject(number, str(error)))
                continue
            if prompt.id in seen:
                rejects.append(Reject(number, f"id {prompt.id!r} is also on line {seen[prompt.id]}"))
                continue
            seen[prompt.id] = number
            prompts.append(prompt)
    if not prompts and not rejects:
        raise DataError(f"{path} has no prompts")
    return prompts, rejects


def refuse(path: Path, rejects: Sequence[Reject]) -> None:
    """Stop if any line was rejected.

    Raises:
        DataError: naming the lines, the first few with their reasons.
    """
    if not rejects:
        return
    shown = "\n    ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:MAX_SHOWN])
    more = f"\n    and {len(rejects) - MAX_SHOWN} more" if len(rejects) > MAX_SHOWN else ""
    raise DataError(
        f"{path} has {len(rejects)} bad line(s):\n    {shown}{more}",
        hint="fix or delete these lines, or leave them out with --skip-bad (data.skip_bad = true)",
    )


def write_rejects(source: Path, rejects: Sequence[Reject], target: Path) -> None:
    """Write the rejected lines of ``source`` as JSON lines: ``line``, ``reason`` and the ``text`` as it was."""
    wanted = {reject.line: reject.reason for reject in rejects}
    records = []
    with source.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number in wanted:
                text = line.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
                records.append({"line": number, "reason": wanted[number], "text": text})
    write_text_atomic(target, "".join(json.dumps(record) + "\n" for record in records))


def _parse(line: bytes, number: int, config: DataConfig, need_answer: bool) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    text = record.get(config.prompt_field)
    if not isinstance(text, str):
        names = ", ".join(sorted(record)) or "none"
        raise ValueError(f"no text in field {config.prompt_field!r} (fields: {names}; see data.prompt_field)")
    if not text.strip():
        raise ValueError(f"field {config.prompt_field!r} is empty")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise ValueError(f"field {config.prompt_field!r} holds half of a surrogate pair")
    answer = record.get(config.answer_field)
    if need_answer and answer is None:
        raise ValueError(f"no field {config.answer_field!r} (see data.answer_field)")
    return Prompt(
        id=str(record.get(config.id_field, number)),
        text=config.template.replace("{prompt}", text),
        answer=None if answer is None else str(answer),
        domain=str(record.get(config.domain_field, "")),
        line=number,
    )


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, max_length: int, limit: int | None = None
) -> tuple[list[Prompt], list[list[int]], list[Reject]]:
    """The first ``limit`` prompts that fit, their token ids, and what was rejected on the way.

    Rejected are prompts without tokens and those of more than ``max_length`` tokens.

    Raises:
        DataError: ``chat`` without a chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("data.chat is true, but the tokenizer has no chat template")
    kept: list[Prompt] = []
    encoded: list[list[int]] = []
    rejects: list[Reject] = []
    for prompt in prompts:
        if limit is not None and len(kept) == limit:
            break
        if chat:
            messages = [{"role": "user", "content": prompt.text}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            tokens = tokenizer(prompt.text)["input_ids"]
        if not tokens:
            rejects.append(Reject(prompt.line, f"prompt {prompt.id!r} has no tokens"))
        elif len(tokens) > max_length:
            reason = f"prompt {prompt.id!r} has {len(tokens)} tokens, room is for {max_length}"
            rejects.append(Reject(prompt.line, reason))
        else:
            kept.append(prompt)
            encoded.append([int(t) for t in tokens])
    return kept, encoded, rejects
