"""The check that student and teacher read the same prompts: chat templates are compared by the tokens they produce."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tropd.pipeline.models.tokenizers import chat_template
from tropd.pipeline.problems.encoding import EncodedPrompt, encode_prompts
from tropd.storage.errors import ConfigError

BEFORE = 8
"""Tokens before the first difference that are shown."""
WAYS_OUT = (
    "set student.chat_template_args and teacher.chat_template_args so that they do not differ, or give one of them the "
    "other's template (chat_template_file)"
)


def check_same_prompts(
    prompts: Sequence[EncodedPrompt],
    student: Any,
    teacher: Any,
    *,
    student_args: Mapping[str, Any] = {},
    teacher_args: Mapping[str, Any] = {},
    date: datetime.date | None = None,
    hint: str = WAYS_OUT,
) -> None:
    """Refuse chat templates that write a prompt in two ways. Templates of one text are not compared any further.

    Args:
        prompts: as the student reads them.
        student: its tokenizer; ``teacher`` likewise.
        student_args: arguments of its template; ``teacher_args`` likewise.
        date: that is told to templates.

    Raises:
        ConfigError: naming the prompt and the first token that differs, or the prompt that the teacher's does not take.
    """
    if _rules(student, student_args) == _rules(teacher, teacher_args):
        return
    given = [one.prompt for one in prompts]
    theirs = encode_prompts(
        given, teacher, chat=True, template_args=teacher_args, max_length=sys.maxsize, date=date
    )
    if theirs.rejects:
        raise ConfigError(f"of the teacher: {theirs.rejects[0].reason}", hint=hint)
    for mine, other in zip(prompts, theirs.prompts, strict=True):
        if list(mine.tokens) != list(other.tokens):
            raise ConfigError(_difference(mine, other, student), hint=hint)


def _rules(tokenizer: Any, args: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything that a template's output depends on besides the prompt, for tokenizers of one vocabulary."""
    return chat_template(tokenizer), tokenizer.bos_token, tokenizer.eos_token, dict(args)


def _difference(mine: EncodedPrompt, other: EncodedPrompt, tokenizer: Any) -> str:
    common = zip(mine.tokens, other.tokens, strict=False)
    shorter = min(len(mine.tokens), len(other.tokens))
    place = next((n for n, (one, two) in enumerate(common) if one != two), shorter)

    def shown(tokens: Sequence[int]) -> str:
        if place >= len(tokens):
            return "the end"
        return f"{tokens[place]} {tokenizer.decode([tokens[place]])!r}"

    after = tokenizer.decode(list(mine.tokens[max(0, place - BEFORE) : place]))
    return (
        f"student and teacher read prompt {mine.id!r} differently: token {place} is {shown(mine.tokens)} for the student "
        f"and {shown(other.tokens)} for the teacher, after {after!r}"
    )
