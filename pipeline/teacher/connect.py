"""Reaching the teacher of a run: the servers that are configured, or a local one started for the purpose."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tropd.pipeline.models.directories import model_directory, model_is_here
from tropd.pipeline.models.loading import check_lengths, weights_digest
from tropd.pipeline.models.tokenizers import differing_parts, tokenizer_identity
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.run.identity import model_fields
from tropd.pipeline.run.opening import check_pair, role_room
from tropd.pipeline.run.run import Run, with_teacher
from tropd.pipeline.teacher.by_domain import fields_of_all, teachers_in_use, with_only
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.local_service import LocalTeacher, serve_command
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.storage.errors import ConfigError
from tropd.storage.stage.fingerprint import Scalar


def local_teacher(run: Run) -> Path | None:
    """The directory of a run's one teacher; None where it is not on this machine (``teacher.url`` names its server)."""
    teacher = run.config.teacher
    if teacher.urls and not model_is_here(run.workspace, teacher):
        return None
    return model_directory(run.workspace, teacher, "teacher")


def check_pairs(run: Run) -> None:
    """See ``check_pair``, for the student and every teacher on this machine."""
    for name in teachers_in_use(run):
        own = with_only(run, name)
        if local_teacher(own) is not None:
            check_pair(own)


def teacher_fields(run: Run) -> dict[str, Scalar]:
    """Fingerprint fields of all teachers: of a directory, or the servers' descriptions where none is here."""
    return fields_of_all(run, teachers_in_use(run), _fields)


def start_teachers(
    run: Run, stack: ExitStack, log_name: str = "teacher-service", *, rank: int = 0
) -> dict[str, LocalTeacher]:
    """Start a service for every teacher without an address; the services are stopped when ``stack`` closes.

    Args:
        rank: of this process among those that train together: only the first one starts those that all ask.
    """
    started = {}
    for name in teachers_in_use(run):
        own = with_only(run, name)
        if not own.config.teacher.urls and (rank == 0 or _beside_every_process(own)):
            run.reporter.info(f"starting a local teacher service{name and f' for {name}'}")
            command = serve_command(run.workspace.root, run.assignments, name)
            log = (
                run.workspace.logs / f"{log_name}{name and f'-{name}'}{(rank and f'-rank-{rank}') or ''}.log"
            )
            started[name] = stack.enter_context(
                LocalTeacher(command, log, one_device=serves_on_one_device(own))
            )
    return started


def _beside_every_process(run: Run) -> bool:
    return run.config.teacher.placement == "every" and serves_on_one_device(run)


def serves_on_one_device(run: Run) -> bool:
    """True unless the teacher's engine spreads a model over several GPUs."""
    return run.config.teacher.scorer != "vllm" or run.config.vllm.tensor_parallel_size == 1


def connect_teachers(
    run: Run,
    stack: ExitStack,
    *,
    started: Mapping[str, LocalTeacher],
    tokenizer: Any,
    stop_ids: Collection[int],
    needed_length: int,
    on_wait: Callable[[str], None],
    sleep: Callable[[float], None],
    known: Mapping[str, str] | None = None,
) -> dict[str, TeacherClient]:
    """A client for every teacher in use, by the teacher's name; see ``connect_teacher``.

    Args:
        started: the services that this process has started.
        known: addresses of such services that another process of the run has started.
    """
    clients = {}
    for name in teachers_in_use(run):
        own = with_only(run, name)
        if known is not None and name not in started and not own.config.teacher.urls:
            own = with_teacher(own, known[name])
        clients[name] = connect_teacher(
            own,
            stack,
            started=started.get(name),
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            needed_length=needed_length,
            on_wait=on_wait,
            sleep=sleep,
        )
    return clients


def _fields(run: Run) -> dict[str, Scalar]:
    if local_teacher(run) is not None:
        return model_fields(run, "teacher")
    with _client(run, run.config.teacher.urls, run.reporter.warning, time.sleep) as client:
        info = client.info()
    tokenizer = info.tokenizer or str(model_fields(run, "student")["student.tokenizer"])
    return {
        "teacher.weights": info.weights,
        "teacher.tokenizer": tokenizer,  # a vLLM server's is compared with the student's by its texts
        "teacher.dtype": run.config.teacher.settled_dtype,
    }


def connect_teacher(
    run: Run,
    stack: ExitStack,
    *,
    started: LocalTeacher | None,
    tokenizer: Any,
    stop_ids: Collection[int],
    needed_length: int,
    on_wait: Callable[[str], None],
    sleep: Callable[[float], None],
) -> TeacherClient:
    """A client whose servers are known to fit; it is closed with ``stack``.

    Args:
        run: with one teacher.
        started: its service, if it has no address.
        tokenizer: the student's.
        stop_ids: tokens that end the student's responses.
        needed_length: tokens of the longest prompt and response together.
        on_wait: called with the reason why nothing happens while a server is away.
        sleep: waits between two attempts; may raise to end the wait.

    Raises:
        ConfigError: a server's tokenizer or context length does not fit, or it has another teacher.
        TropdError: no server answers at ``teacher.url``, or the local one does not start.
    """
    teacher, folder = run.config.teacher, local_teacher(run)
    urls = teacher.urls
    if folder is not None:
        response = run.config.rollout.max_tokens
        check_lengths(role_room(run, "teacher"), needed_length - response, response, who="the teacher")
    if started is not None:
        with run.reporter.waiting("waiting for the teacher service, which loads its model"):
            urls = (started.wait(),)
    client = stack.enter_context(_client(run, urls, on_wait, sleep))
    identity = tokenizer_identity(tokenizer)
    # Of a teacher on this machine the prompts themselves have been compared (see ``reading``).
    by_text = run.config.data.chat and folder is None
    client.check_compatible(
        identity.digest,
        identity.vocab_size,
        needed_length,
        differing_parts(identity.parts, client.info().tokenizer_parts, chat=by_text),
    )
    info = client.info()
    check_stops(run, client.url, info, stop_ids)
    if info.kind == "vllm" and not client.check_token_texts(tokenizer.decode, identity.vocab_size):
        run.reporter.warning(
            f"the server at {client.url} has no /detokenize: its tokenizer cannot be checked"
        )
    objective = run.config.objective
    client.check_gives(teacher_needs(objective), objective)
    if teacher.urls:
        for replica in client.replicas:
            run.reporter.info(f"train: teacher at {replica.url}: {_described(replica.before)}")
    if folder is None:
        run.reporter.info(
            f"train: teacher.model = {teacher.model!r} is not on this machine; its identity is taken from the service"
        )
    elif info.kind == "vllm":
        run.reporter.info(
            f"train: a vLLM server does not report its weights; {info.model} is assumed to be {folder.name}"
        )
    elif info.weights != (weights := weights_digest(folder)):
        raise ConfigError(
            f"the service at {client.url} has another teacher than teacher.model = {teacher.model!r}: "
            f"weights {info.weights[:12]}… there, {weights[:12]}… here",
            hint="name that teacher in teacher.model, or the service of this one in teacher.url",
        )
    return client


def check_stops(run: Run, url: str, info: ServiceInfo, stop_ids: Collection[int]) -> None:
    """Refuse a teacher that ends its responses where the student is not stopped; a server may not say where."""
    if run.config.rollout.stop_ids is not None:
        return
    if missing := sorted(set(info.stop_ids) - set(stop_ids)):
        raise ConfigError(
            f"the teacher at {url} ({info.model}) ends its responses with token ids {list(info.stop_ids)}, but the "
            f"student is not stopped at {missing}",
            hint=f"set rollout.stop_ids = {sorted({*info.stop_ids, *stop_ids})}",
        )
    if not info.stop_ids and local_teacher(run) is None:
        run.reporter.warning(
            f"the teacher at {url} does not say which tokens end its responses: the student's own are used, "
            f"{sorted(stop_ids)}; rollout.stop_ids sets others"
        )


def _client(
    run: Run, urls: tuple[str, ...], on_wait: Callable[[str], None], sleep: Callable[[float], None]
) -> TeacherClient:
    teacher = run.config.teacher
    return TeacherClient(
        urls,
        token=os.environ.get(teacher.token_env) or None,
        timeout_seconds=teacher.timeout_seconds,
        on_wait=on_wait,
        sleep=sleep,
        alone=True,
    )


def _described(info: ServiceInfo | None) -> str:
    if info is None:
        return "does not answer yet"
    limits = f"at most {info.max_length:,} tokens, top {info.max_topk:,}"
    if info.kind == "vllm":
        return f"vLLM, {info.model}, {limits}, no entropy"
    return f"tropd, {info.model}, weights {info.weights[:12]}…, {limits}"
