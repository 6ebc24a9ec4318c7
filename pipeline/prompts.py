"""Reading prompts: JSONL files, checked line by line before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd.pipeline.config import DataConfig
from tropd.storage.errors import DataError

MAX_SHOWN = 10


@dataclass(frozen=True)
class Prompt:
    """One problem. ``answer`` is None where the file gives none."""

    id: str
    text: str
    answer: str | None


def read_prompts(path: Path, config: DataConfig, *, need_answer: bool = False) -> list[Prompt]:
    """Read and check a JSONL file.

    Raises:
        DataError: the file is missing or empty, or has bad lines; every bad line is named with its number.
    """
    if not path.is_file():
        raise DataError(
            f"prompt file {path} does not exist",
            hint="set data.prompts / data.evaluation; for the demo recipes run tropd prepare first",
        )
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    problems: list[str] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                prompt = _parse(line, number, config, need_answer)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            if prompt.id in seen:
                problems.append(f"line {number}: id {prompt.id!r} is also on line {seen[prompt.id]}")
                continue
            seen[prompt.id] = number
            prompts.append(prompt)
    if problems:
        shown = "\n    ".join(problems[:MAX_SHOWN])
        more = f"\n    and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise DataError(
            f"{path} has {len(problems)} bad line(s):\n    {shown}{more}", hint="fix or delete these lines"
        )
    if not prompts:
        raise DataError(f"{path} has no prompts")
    return prompts


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
        text=text,
        answer=None if answer is None else str(answer),
    )


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, max_length: int, path: Path
) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        DataError: a prompt has no tokens, or more than ``max_length``.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("data.chat is true, but the student's tokenizer has no chat template")
    encoded: list[list[int]] = []
    for prompt in prompts:
        if chat:
            messages = [{"role": "user", "content": prompt.text}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            tokens = tokenizer(prompt.text)["input_ids"]
        if not tokens:
            raise DataError(f"{path}: prompt {prompt.id!r} has no tokens")
        if len(tokens) > max_length:
            raise DataError(
                f"{path}: prompt {prompt.id!r} has {len(tokens)} tokens, room is for {max_length}",
                hint="drop it, or lower rollout.max_tokens",
            )
        encoded.append([int(t) for t in tokens])
    return encoded
