"""Reading prompts: files of records, checked one by one before any model is loaded.

A record that cannot be used is a ``Reject`` with its number and a reason. The caller decides what that means:
``refuse`` stops with all of them named, ``write_rejects`` puts them into a separate file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.problems.chat_messages import (
    Message,
    as_text,
    in_template,
    is_messages,
    last_user_turn,
    read_messages,
    with_system,
)
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import DataError, closest
from tropd.storage.formats.record_fields import field_names, field_text, value_at
from tropd.storage.formats.records import read_records, record_unit

MAX_SHOWN = 10
PROMPT, MESSAGES = "prompt", "messages"
"""Default field of the prompt, and the field that may hold a conversation where that one is missing."""


@dataclass(frozen=True)
class Prompt:
    """One problem. ``answer`` is None where the file gives none, or none that a grader could use."""

    id: str
    text: str
    """The question; of a conversation, all of it as text, to be shown and compared."""
    answer: str | None
    domain: str = ""
    """Its domain, where the file says so."""
    line: int = field(default=0, compare=False)
    """Where it is in its file, counted from 1."""
    messages: tuple[Message, ...] = ()
    """A conversation for the chat template; none where the text is the user's only turn."""
    fields: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Other fields of its record, as text, where a teacher's context names them."""

    @property
    def turns(self) -> Sequence[Message]:
        """The messages that a chat template takes."""
        return self.messages or ({"role": "user", "content": self.text},)

    @property
    def asked(self) -> str:
        """The text of the problem: all turns but the system's, without their roles."""
        return "\n\n".join(turn["content"] for turn in self.turns if turn["role"] != "system")


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used."""

    line: int
    reason: str


def scan_prompts(
    path: Path,
    config: DataConfig,
    *,
    need_answer: bool = False,
    check_answer: bool = False,
    also: Callable[[str], Mapping[str, str]] = lambda domain: {},
) -> tuple[list[Prompt], list[Reject]]:
    """The usable prompts of a file (JSON lines, one JSON array, Parquet or CSV), and its bad records.

    Args:
        need_answer: a record without an answer is bad.
        check_answer: so is one whose answer exists and is not text; otherwise the answer is not looked at.
        also: further fields that a record of a domain needs (see ``Prompt.fields``), and the setting that names each.

    Raises:
        DataError: the file is missing, cannot be read, or has no records; or none of them has a further field.
    """
    if not path.is_file():
        raise DataError(
            f"prompt file {path} does not exist",
            hint="set data.prompts / data.evaluation; for the demo recipes run tropd prepare first",
        )
    prompts: list[Prompt] = []
    rejects: list[Reject] = []
    seen: dict[str, int] = {}
    lacked: dict[tuple[str, str], bool] = {}
    columns: set[str] = set()
    for record in read_records(path):
        try:
            if record.fields is None:
                raise ValueError(record.problem)
            prompt = _prompt(record.fields, record.number, config, need_answer, check_answer)
            if named := also(prompt.domain):
                columns.update(record.fields)
                for further in named.items():
                    lacked[further] = lacked.get(further, True) and not _has(record.fields, further[0])
                prompt = replace(
                    prompt, fields={name: needed_text(record.fields, name, by) for name, by in named.items()}
                )
            if prompt.id in seen:
                unit = record_unit(path)
                raise ValueError(f"id {short(prompt.id)} is also on {unit} {seen[prompt.id]}")
        except ValueError as error:
            rejects.append(Reject(record.number, str(error)))
            continue
        seen[prompt.id] = record.number
        prompts.append(prompt)
    if not prompts and not rejects:
        raise DataError(f"{path} has no prompts")
    for (name, setting), by_all in lacked.items():
        if by_all:
            raise DataError(
                f"{setting} names the field {name!r}, and no record of {path} has it: {closest(name, sorted(columns))}"
                f"fields: {field_names(dict.fromkeys(columns))}",
                hint=f"write the name of a field in the braces of {setting}; other braces, such as {{}}, are text",
            )
    return prompts, rejects


def _has(record: Mapping[str, Any], path: str) -> bool:
    return path in record or value_at(record, path) is not None


def refuse(path: Path, rejects: Sequence[Reject]) -> None:
    """Stop if any record was rejected.

    Raises:
        DataError: naming the records, the first few with their reasons.
    """
    if not rejects:
        return
    unit = record_unit(path)
    raise DataError(
        f"{path} has {len(rejects)} bad {unit}(s):\n    {list_rejects(rejects, unit)}",
        hint="mend or delete them, or leave them out with --skip-bad (data.skip_bad = true)",
    )


def list_rejects(rejects: Sequence[Reject], unit: str) -> str:
    """The first few reasons, one a line, each with the numbers of its records; ``unit`` names the counted things."""
    numbers: dict[str, list[int]] = {}
    for reject in rejects:
        numbers.setdefault(reject.reason, []).append(reject.line)
    shown = [f"{_counted(found, unit)}: {reason}" for reason, found in list(numbers.items())[:MAX_SHOWN]]
    if len(numbers) > MAX_SHOWN:
        shown.append(f"and {sum(map(len, list(numbers.values())[MAX_SHOWN:]))} more")
    return "\n    ".join(shown)


def _counted(numbers: Sequence[int], unit: str) -> str:
    first = ", ".join(map(str, numbers[:MAX_SHOWN]))
    more = f" and {len(numbers) - MAX_SHOWN} more" if len(numbers) > MAX_SHOWN else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {first}{more}"


def write_rejects(source: Path, rejects: Sequence[Reject], target: Path) -> None:
    """Write the rejected records of ``source`` as JSON lines: ``line``, ``reason`` and the ``text`` as it was.

    Of a long one, the text is the beginning. ``line`` is its number, where records are no lines.
    """
    wanted = {reject.line: reject.reason for reject in rejects}
    lines = [
        json.dumps({"line": record.number, "reason": wanted[record.number], "text": record.shown}) + "\n"
        for record in read_records(source)
        if record.number in wanted
    ]
    write_text_atomic(target, "".join(lines))


def prompt_text(
    record: Mapping[str, Any], path: str, setting: str, *, chat: bool
) -> tuple[str, tuple[Message, ...]]:
    """The prompt of a record: its text, or the messages of a conversation.

    A list with one turn of the user is a text.

    Args:
        path: the field, by name or by path.
        setting: the setting that names it, for the error: ``data.prompt_field``.
        chat: whether prompts are written with a chat template, which a conversation needs.

    Raises:
        ValueError: it is missing, or something else.
    """
    value = value_at(record, path)
    if value is None and path == PROMPT and record.get(MESSAGES) is not None:
        path, value = MESSAGES, record[MESSAGES]
        if not is_messages(value):
            raise ValueError(
                f"field {path!r} is not a list of messages, each an object with a role and content"
            )
    if is_messages(value):
        if not chat:
            example = f"{path}.{last_user_turn(value)}.content"
            raise ValueError(
                f"field {path!r} is a list of messages, which only a chat template can write: "
                f'set data.chat = true, or name one text: {setting} = "{example}"'
            )
        try:
            messages = read_messages(value)
        except ValueError as error:
            raise ValueError(f"field {path!r} {error}") from None
        return ("", messages) if len(messages) > 1 else (messages[0]["content"], ())
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        raise ValueError(f"field {path!r} is a number, not text")
    text = field_text(record, path, setting)
    if text is None:
        raise _nothing(record, path, setting)
    if not text.strip():
        raise ValueError(f"field {path!r} is empty")
    return text, ()


def answer_text(record: Mapping[str, Any], path: str, setting: str) -> str:
    """The answer of a record, where one is needed; arguments as of ``prompt_text``.

    Raises:
        ValueError: it is missing, or not text.
    """
    answer = field_text(record, path, setting)
    if answer is None:
        raise _nothing(record, path, setting)
    if not answer.strip():
        raise ValueError(f"field {path!r} is empty, and an answer is needed")
    return answer


def _nothing(record: Mapping[str, Any], path: str, setting: str) -> ValueError:
    if path in record:
        return ValueError(f"field {path!r} is null")
    other = f" or {MESSAGES!r}" if path == PROMPT else ""
    return ValueError(f"no field {path!r}{other} (fields: {field_names(record)}; see {setting})")


def needed_text(record: Mapping[str, Any], path: str, setting: str) -> str:
    """A further field of a record, which may be empty; arguments as of ``prompt_text``.

    Raises:
        ValueError: it is missing, or not text.
    """
    text = field_text(record, path, setting)
    if text is None:
        raise _nothing(record, path, setting)
    return text


def short(text: str) -> str:
    """A name as it is quoted in messages."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}…"


def _prompt(
    record: Mapping[str, Any], number: int, config: DataConfig, need_answer: bool, check_answer: bool
) -> Prompt:
    text, messages = prompt_text(record, config.prompt_field, "data.prompt_field", chat=config.chat)
    messages = in_template(messages, config.template) if messages else ()
    asked = as_text(messages) if messages else config.template.replace("{prompt}", text)
    if config.system is not None:
        messages = with_system(messages or ({"role": "user", "content": asked},), config.system)
    name = field_text(record, config.id_field, "data.id_field")
    try:
        answer: str | None = answer_text(record, config.answer_field, "data.answer_field")
    except ValueError:
        given = value_at(record, config.answer_field)
        if need_answer or (check_answer and given is not None and str(given).strip()):
            raise
        answer = None
    return Prompt(
        id=str(number) if name is None else name,
        text=asked,
        answer=answer,
        domain=field_text(record, config.domain_field, "data.domain_field") or "",
        line=number,
        messages=messages,
    )
