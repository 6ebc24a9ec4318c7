"""Prompts as the teachers read them: as the student does, or in a context of their own (``teacher.context``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tropd.pipeline.config.sections.model_settings import TeacherContext
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt, encode_prompts, token_digest
from tropd.pipeline.problems.prompts import Reject, refuse
from tropd.pipeline.problems.same_prompts import WAYS_OUT, check_same_prompts
from tropd.pipeline.problems.teacher_context import in_context
from tropd.pipeline.run.identity import template_fields
from tropd.pipeline.run.opening import role_room, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import template_date, training_prompts
from tropd.pipeline.teacher.by_domain import GENERAL, fields_of_all, teacher_of, teachers_in_use, with_only
from tropd.pipeline.teacher.connect import local_teacher
from tropd.storage.formats.trajectories import Author
from tropd.storage.stage.fingerprint import Scalar

AS_TEACHER = "data.prompts as the teacher reads them"
UNLIKE = f'{WAYS_OUT}; teacher.context.template = "{{prompt}}" lets the teacher read prompts in its own way'


def prompts_of(run: Run, author: Author) -> Encoded:
    """The training prompts that leave an author room for a response, as student and teachers read them.

    Raises:
        ConfigError, DataError: some cannot be read; naming file, line and field.
    """
    names = teachers_in_use(run) if author == "teacher" else [GENERAL]
    room = min(role_room(with_only(run, name), author) for name in names)
    found = training_prompts(run, role_tokenizer(run, "student"), room)
    return as_teachers_read(run, found, "prompts", run.config.rollout.max_tokens)


def scored_prompts(run: Run, source: str) -> Encoded:
    """The prompts that the trajectories of a stage answer, as their teachers read them."""
    return prompts_of(run, "teacher" if source == "prefixes" else "student")


def as_teachers_read(run: Run, found: Encoded, file: str, response: int) -> Encoded:
    """The prompts with the token ids of their teachers' contexts; teachers without one read them as the student does.

    Args:
        file: field of [data] that names the file that they come from.
        response: most tokens of a response.

    Raises:
        ConfigError: a teacher's chat template writes a prompt in another way than the student's.
        DataError: a context leaves no room for a response (``data.skip_bad`` leaves the prompt out).
    """
    names = teachers_in_use(run)
    read: dict[str, EncodedPrompt] = {}
    rejects: list[Reject] = []
    for name in names:
        own = with_only(run, name)
        prompts = [one for one in found.prompts if teacher_of(run, one.prompt.domain) == name]
        context = own.config.teacher.context
        if context is not None:
            told, bad = _told(own, prompts, context, response)
            read |= {one.id: one for one in told}
            rejects += bad
        else:
            _check_same(own, prompts)
            read |= {one.id: one for one in prompts}
    path = run.workspace.resolve(getattr(run.config.data, file))
    if rejects and not run.config.data.skip_bad:
        refuse(path, sorted(rejects, key=lambda reject: reject.line))
    if rejects:
        run.reporter.warning(
            f"{path}: {len(rejects)} prompt(s) left out, which the teacher's context makes too long"
        )
    # Prompts of a teacher that is not in use stay as they are: it is asked about none of them.
    others = {one.id: one for one in found.prompts if teacher_of(run, one.prompt.domain) not in names}
    known = read | others
    return replace(found, prompts=[known[one.id] for one in found.prompts if one.id in known])


def _check_same(run: Run, prompts: Sequence[EncodedPrompt]) -> None:
    if run.config.data.chat and local_teacher(run) is not None:
        check_same_prompts(
            prompts,
            role_tokenizer(run, "student"),
            role_tokenizer(run, "teacher"),
            student_args=run.config.student.chat_template_args,
            teacher_args=run.config.teacher.chat_template_args,
            date=template_date(run),
            hint=UNLIKE,
        )


def _told(
    run: Run, prompts: Sequence[EncodedPrompt], context: TeacherContext, response: int
) -> tuple[list[EncodedPrompt], Sequence[Reject]]:
    """The prompts with the token ids of the one teacher's context, and those that it cannot read."""
    room = 2**31 - 1 if local_teacher(run) is None else role_room(run, "teacher") - response
    found = encode_prompts(
        [in_context(one.prompt, context) for one in prompts],
        _tokenizer(run),
        chat=run.config.data.chat,
        template_args=run.config.teacher.chat_template_args,
        max_length=room,
        date=template_date(run),
    )
    own = {one.id: one.tokens for one in found.prompts}
    told = [replace(one, teacher_tokens=own[one.id]) for one in prompts if one.id in own]
    return told, [Reject(bad.line, f"in the teacher's context, {bad.reason}") for bad in found.rejects]


def _tokenizer(run: Run) -> Any:
    """The teacher's; of one that is not on this machine the student's, which has the same tokens."""
    here = local_teacher(run) is not None
    return role_tokenizer(
        run, "teacher", None if here else model_directory(run.workspace, run.config.student, "student")
    )


def context_fields(run: Run, prompts: Sequence[EncodedPrompt]) -> dict[str, Scalar]:
    """Fingerprint fields of what teachers are told: none where all read what the student reads.

    Args:
        prompts: that they are asked about.
    """
    if not run.config.teacher.contexts:
        return {}

    def of(run: Run) -> dict[str, Scalar]:
        context = run.config.teacher.context
        if context is None:
            return {}
        fields: dict[str, Scalar] = {"teacher.context.template": context.template}
        if context.system is not None:
            fields["teacher.context.system"] = context.system
        return fields | template_fields(run, "teacher")

    told = [replace(one, tokens=one.scored_after) for one in prompts]
    return fields_of_all(run, teachers_in_use(run), of) | {AS_TEACHER: token_digest(told)}
