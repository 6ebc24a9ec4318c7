"""A teacher's own context: the prompt in another text, with fields of its record that the student does not see."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tropd.pipeline.config.sections.model_settings import TeacherContext
from tropd.pipeline.problems.chat_messages import as_text, with_question
from tropd.pipeline.problems.prompts import Prompt

PROMPT = "prompt"
_FIELD = re.compile(r"\{([A-Za-z_][\w.-]*)\}")
"""A field's name, or path, in braces. Braces around anything else are text, as in LaTeX."""


def named_fields(context: TeacherContext | None) -> dict[str, str]:
    """The fields of a record that a context names, besides the prompt, and which of its settings does; none without a
    context."""
    if context is None:
        return {}
    texts = {"template": context.template, "system": context.system or ""}
    return {name: text for text in texts for name in _FIELD.findall(texts[text]) if name != PROMPT}


def in_context(prompt: Prompt, context: TeacherContext) -> Prompt:
    """The prompt as the teacher is told it: its text, or the user's last turn, in the template; and the system message.

    Args:
        prompt: read with the fields that the context names.
    """
    # In parts: neither the prompt's text nor a field's is searched for braces.
    around = [_filled(part, prompt.fields) for part in context.template.split("{" + PROMPT + "}")]
    if context.system is None and not prompt.messages:
        return replace(prompt, text=prompt.text.join(around))
    messages = with_question(tuple(prompt.turns), lambda text: text.join(around))
    if context.system is not None:
        question = next(turn["content"] for turn in reversed(prompt.turns) if turn["role"] == "user")
        told = _filled(context.system, {**prompt.fields, PROMPT: question})
        system = {"role": "system", "content": told}
        messages = (system, *(message for message in messages if message["role"] != "system"))
    return replace(prompt, text=as_text(messages), messages=messages)


def _filled(text: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda found: fields[found[1]], text)
