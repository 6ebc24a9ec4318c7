"""Prompts as the teachers read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt
from tropd.pipeline.problems.same_prompts import check_same_prompts
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import template_date
from tropd.pipeline.teacher.by_domain import teacher_of, teachers_in_use, with_only
from tropd.pipeline.teacher.connect import local_teacher


def as_teachers_read(run: Run, found: Encoded) -> Encoded:
    """The prompts, which every teacher on this machine reads as the student does.

    Raises:
        ConfigError: one does not, for its chat template writes a prompt in another way.
    """
    if not run.config.data.chat:
        return found
    for own, prompts in _by_teacher(run, found.prompts):
        if local_teacher(own) is not None:
            check_same_prompts(
                prompts,
                role_tokenizer(own, "student"),
                role_tokenizer(own, "teacher"),
                student_args=own.config.student.chat_template_args,
                teacher_args=own.config.teacher.chat_template_args,
                date=template_date(run),
            )
    return found


def _by_teacher(run: Run, prompts: Sequence[EncodedPrompt]) -> Iterator[tuple[Run, list[EncodedPrompt]]]:
    """Runs with one teacher each, and its prompts."""
    for name in teachers_in_use(run):
        yield with_only(run, name), [one for one in prompts if teacher_of(run, one.prompt.domain) == name]
