"""``serve-teacher``: load the teacher of a run and answer scoring requests until stopped."""

from __future__ import annotations

import os
from collections.abc import Callable

from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.models.loading import weights_digest
from tropd.pipeline.models.stops import stop_ids
from tropd.pipeline.models.tokenizers import tokenizer_identity
from tropd.pipeline.run.opening import open_engine
from tropd.pipeline.run.run import Run, as_scorer
from tropd.pipeline.teacher.service.access_log import open_access_log
from tropd.pipeline.teacher.service.listen import check_address
from tropd.pipeline.teacher.service.running import run_service
from tropd.pipeline.teacher.wire.chosen_ids import MAX_CHOSEN
from tropd.pipeline.teacher.wire.info import ServiceInfo

ACCESS_LOG = "teacher-access.jsonl"


def load_service(run: Run) -> tuple[Engine, ServiceInfo]:
    """The teacher of a run in memory, and the description that its service gives."""
    settings = run.config.service
    folder = model_directory(run.workspace, run.config.teacher, "teacher")
    engine, tokenizer = open_engine(
        as_scorer(run), "teacher", batch_size=1, batch_tokens=settings.batch_tokens
    )
    identity = tokenizer_identity(tokenizer)
    whole_vocabulary = run.config.teacher.scorer == "transformers"
    info = ServiceInfo(
        model=folder.name,
        weights=weights_digest(folder),
        tokenizer=identity.digest,
        tokenizer_size=identity.vocab_size,
        tokenizer_parts=identity.parts,
        stop_ids=tuple(sorted(stop_ids(run.workspace, run.config, "teacher"))),
        vocab_size=engine.vocab_size,
        max_length=engine.max_length,
        max_request_tokens=settings.max_request_tokens,
        max_request_bytes=settings.max_request_bytes,
        queue_tokens=settings.queue_tokens,
        max_topk=engine.vocab_size if whole_vocabulary else max(run.config.scores.k, run.config.objective.k),
        max_chosen=min(MAX_CHOSEN, engine.vocab_size) if whole_vocabulary else 0,
        entropy=whole_vocabulary,
    )
    return engine, info


def serve(run: Run, on_ready: Callable[[str], None], *, exit_with_parent: bool = False) -> None:
    """Run the service in this process; ``on_ready`` gets its URL once it answers."""
    settings = run.config.service
    token = os.environ.get(run.config.teacher.token_env) or None
    check_address(settings.host, token, run.config.teacher.token_env)
    engine, info = load_service(run)
    run_service(
        engine,
        info,
        settings,
        token=token,
        on_ready=on_ready,
        exit_with_parent=exit_with_parent,
        access_log=open_access_log(run.workspace.logs / ACCESS_LOG),
    )
