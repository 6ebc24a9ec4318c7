"""Detection of the fields that hold prompt and answer in a user's records, and of the kind of answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tropd.pipeline.config.sections.value_types import GraderName
from tropd.pipeline.problems.chat_messages import is_messages
from tropd.pipeline.problems.grading.math_answers import expected_answer
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.formats.record_fields import field_names, value_at
from tropd.storage.formats.records import Record, read_records, record_unit

SAMPLE = 1000
"""Records that are looked at."""
PROMPTS = (
    "prompt",
    "question",
    "problem",
    "instruction",
    "messages",
    "conversation",
    "query",
    "input",
    "text",
)
CHOICES = ("choices", "options")
ANSWERS = (
    "answer", "final_answer", "expected_answer", "answerKey", "target", "label", "solution", "reference", "output",
    "response", "completion",
)  # fmt: skip
MOST = 0.9
"""Share of the answers that decides the kind of all."""
MOST_WORDS = 8
"""Longer answers are texts, which no response repeats word for word."""
NUMBER = re.compile(r"[-+±]?[$€£]?[\d.,]*\d(?:/\d+)?(?:e-?\d+)?\s*(?:%|°|\\%)?", re.IGNORECASE)
LATEX = re.compile(r"\\[a-zA-Z]+|\^\{?|_\{|^\$.*\$$")
LETTER = re.compile(r"\(?[A-J]\)?\.?")


@dataclass(frozen=True)
class Fields:
    """Fields of prompts and answers."""

    prompt: str
    answer: str | None
    """None: no field looks like an answer's."""
    messages: bool
    """True if prompts are lists of messages."""
    others: tuple[str, ...]
    """Fields that could be the prompt as well, or a part of it, at least in some records."""


@dataclass(frozen=True)
class Grading:
    """The grading of answers. ``grader`` is None where they cannot be graded."""

    grader: GraderName | None
    reason: str


def sample_records(path: Path) -> list[Mapping[str, Any]]:
    """The first whole records of a file.

    Raises:
        DataError: the file has none, or cannot be read.
    """
    if not path.is_file():
        raise DataError(
            f"prompt file {path} does not exist", hint="name a file of JSON lines, JSON, Parquet or CSV"
        )
    found: list[Mapping[str, Any]] = []
    first_bad: Record | None = None
    for record in read_records(path):
        if record.fields is None:
            first_bad = first_bad or record
        elif len(found) < SAMPLE:
            found.append(record.fields)
        else:
            break
    if not found:
        unit = record_unit(path)
        problem = f": {unit} {first_bad.number} {first_bad.problem}" if first_bad else ""
        other = path.suffix.lower() not in (".jsonl", ".json", ".parquet", ".csv")
        raise DataError(
            f"{path} has no records that can be used{problem}",
            hint='prompts are read from JSON lines (such as {"prompt": "1+1"}), a JSON array, Parquet, or .csv with '
            "commas" + ("; a file of lines or tabs has to become one of these" if other else ""),
        )
    return found


def find_fields(
    path: Path, records: Sequence[Mapping[str, Any]], prompt: str | None = None, answer: str | None = None
) -> Fields:
    """The fields of prompt and answer; given ones are taken, and have to be there.

    Raises:
        ConfigError: nothing looks like a prompt, or a given field is nowhere.
    """
    for name, option in ((prompt, "--prompt-field"), (answer, "--answer-field")):
        if name is not None and not any(value_at(record, name) is not None for record in records):
            raise ConfigError(f"{path}: no record has the field {name!r} of {option}", hint=_there(records))
    filled = {name: _share(records, lambda r, n=name: _is_prompt(value_at(r, n))) for name in PROMPTS}
    # Records without it, if they are few, are told by their lines when the prompts are read.
    usable = [name for name in PROMPTS if filled[name] == max(filled.values()) > 0.5]
    if prompt is None and not usable:
        raise ConfigError(
            f"{path}: no field looks like the prompt of most records (looked for: {', '.join(PROMPTS)})",
            hint=f"name it with --prompt-field; {_there(records)}",
        )
    chosen = prompt or usable[0]
    if answer is None:
        found = (name for name in ANSWERS if name != chosen and _is_filled(records, name))
        answer = next(found, None)
    messages = any(is_messages(value_at(record, chosen)) for record in records)
    return Fields(
        chosen,
        answer,
        messages,
        tuple(name for name in PROMPTS if filled[name] and name not in (chosen, answer)),
    )


def _there(records: Sequence[Mapping[str, Any]]) -> str:
    return f"the first record has: {field_names(records[0])}"


def _is_prompt(value: Any) -> bool:
    return is_messages(value) or (isinstance(value, str) and bool(value.strip()))


def _is_filled(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    """True if most records have a text or number there."""
    values = [value_at(record, name) for record in records]
    good = [
        v for v in values if v is not None and not isinstance(v, list | Mapping | bool) and str(v).strip()
    ]
    return len(good) >= len(values) / 2


def answers_of(records: Sequence[Mapping[str, Any]], name: str | None) -> list[str]:
    """The answers that exist."""
    values = [] if name is None else [value_at(record, name) for record in records]
    return [str(value).strip() for value in values if value is not None and str(value).strip()]


def grading_in(records: Sequence[Mapping[str, Any]], fields: Fields) -> Grading:
    """The grader that fits the records' answers; none where these are choices that the prompts do not show."""
    for name in CHOICES:
        hidden = [record for record in records if _hides_choices(record, name, fields)]
        if len(hidden) >= len(records) / 2:
            return Grading(
                None,
                f"answers are positions in {name!r}, which the prompts do not show: write the choices into the prompts, "
                "with letters, and the letter as the answer",
            )
    return grading_of(answers_of(records, fields.answer))


def _hides_choices(record: Mapping[str, Any], name: str, fields: Fields) -> bool:
    """True if a record's answer is the position of a choice that its prompt does not have."""
    found, labels = value_at(record, name), []
    if isinstance(found, Mapping):  # {"text": […], "label": […]} in ARC, {"A": …, "B": …} in MedQA
        labels = list(found.get("label") or found)
        found = found["text"] if isinstance(found.get("text"), list) else list(found.values())
    answer = None if fields.answer is None else value_at(record, fields.answer)
    if not isinstance(found, list) or len(found) < 2 or answer is None:
        return False
    texts, given, prompt = [str(text) for text in found], str(answer), str(value_at(record, fields.prompt))
    number = given.isdecimal() and int(given) <= len(texts)
    position = number or given in labels or LETTER.fullmatch(given) is not None
    return position and given not in texts and not all(text in prompt for text in texts)


def grading_of(answers: Sequence[str]) -> Grading:
    """The grader that fits reference answers.

    Numbers and LaTeX are compared as mathematics, also where they end a worked solution; letters A to J as choices;
    other short texts word for word. Whole sentences cannot be graded so, and accuracy would be 0 whatever is learned.
    """
    if not answers:
        return Grading(None, "no answers, so evaluation is by distance to the teacher alone")
    if _share(answers, lambda text: LETTER.fullmatch(text)) >= MOST:
        return Grading("choice", "answers are single letters")
    final = [expected_answer(text) for text in answers]
    if _share(final, lambda text: NUMBER.fullmatch(text) or LATEX.search(text)) >= MOST:
        return Grading("math", "answers are numbers or LaTeX")
    words = median(len(text.split()) for text in answers)
    if words > MOST_WORDS:
        return Grading(
            None,
            f"answers are texts of {words:.0f} words, which no grader compares: evaluation is by distance alone",
        )
    return Grading("exact", "answers are short texts: right is a response that is nothing but the answer")


def _share(values: Sequence[Any], fits: Any) -> float:
    return sum(bool(fits(value)) for value in values) / len(values)
