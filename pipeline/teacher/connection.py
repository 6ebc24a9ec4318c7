"""Reaching the teacher service of a run: the one that is configured, or a local one started for the purpose."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from tropd.pipeline.context import Run
from tropd.pipeline.models import TokenizerIdentity, model_directory, weights_digest
from tropd.pipeline.objectives.spec import teacher_needs
from tropd.pipeline.teacher.client import TeacherClient
from tropd.pipeline.teacher.process import LocalTeacher, serve_command
from tropd.storage.errors import ConfigError


def connect_teacher(
    run: Run,
    stack: ExitStack,
    *,
    identity: TokenizerIdentity,
    needed_length: int,
    on_wait: Callable[[str], None],
) -> TeacherClient:
    """A client whose service is known to fit; what was started is stopped when ``stack`` closes.

    Raises:
        ConfigError: the service's tokenizer or context length does not fit, or it has another teacher.
        TropdError: there is no service at ``teacher.url``, or the local one does not start.
    """
    teacher = run.config.teacher
    url = teacher.url
    if url is None:
        run.reporter.info("train: starting a local teacher service")
        command = serve_command(run.workspace.root, run.assignments)
        url = stack.enter_context(LocalTeacher(command, run.workspace.logs / "teacher-service.log")).url
    client = stack.enter_context(
        TeacherClient(
            url,
            token=os.environ.get(teacher.token_env) or None,
            timeout_seconds=teacher.timeout_seconds,
            on_wait=on_wait,
        )
    )
    client.check_compatible(identity.digest, identity.vocab_size, needed_length)
    objective = run.config.objective
    client.check_gives(teacher_needs(objective), objective)
    weights = weights_digest(model_directory(run.workspace, teacher, "teacher"))
    if client.info().weights != weights:
        raise ConfigError(
            f"the service at {url} has another teacher than teacher.model = {teacher.model!r}: "
            f"weights {client.info().weights[:12]}… there, {weights[:12]}… here",
            hint="name that teacher in teacher.model, or the service of this one in teacher.url",
        )
    return client
