"""Held-out prompts of a training run and its teachers' responses to them, made once, before the first step.

In ``W/held-out/<identity>.parquet``: a function of prompts, teachers, seed and the length of responses. A file
that is gone or damaged is made again; one of another identity is left where it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.problems.encoding import Encoded, token_digest
from tropd.pipeline.run.identity import stop_fields
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.distance import DenseTopk
from tropd.pipeline.stages.evaluation.held_out import HeldOut, as_told, held_out_prompts, sample_responses
from tropd.pipeline.stages.evaluation.teacher_answers import ask_engine
from tropd.pipeline.teacher.by_domain import EngineSlot, with_only
from tropd.pipeline.teacher.connect import local_teacher, teacher_fields
from tropd.pipeline.teacher.reading import context_fields
from tropd.storage.disk.atomic import atomic_file

FOLDER = "held-out"


@dataclass(frozen=True)
class TeacherResponse:
    """A teacher's response to a prompt, and its likeliest tokens at each position of it."""

    prompt_tokens: list[int]
    tokens: list[int]
    alternatives: DenseTopk


@dataclass(frozen=True)
class HeldOutSet:
    """The prompts and responses that a student is compared on while it trains."""

    prompts: HeldOut
    written: list[TeacherResponse]
    """Those of teachers of transformers whose models are on this machine."""


def read_held_out(run: Run, problems: Encoded) -> HeldOutSet:
    """The held-out prompts among the problems, with the responses of teachers to them, sampled if they do not exist.

    A teacher is loaded in this process for that, and freed again.
    """
    prompts = held_out_prompts(run, problems)
    names = [name for name in dict.fromkeys(prompts.teachers) if _samples_here(with_only(run, name))]
    if not names:
        run.reporter.info(
            "train: no transformers teacher is on this machine: the forward KL on held-out prompts, which needs its "
            "responses, is not measured during training"
        )
        return HeldOutSet(prompts, [])
    path = run.workspace.root / FOLDER / f"{_identity(run, prompts, names)[:16]}.parquet"
    written = _read(path)
    if written is None:
        with run.reporter.waiting(f"sampling {len(prompts.prompts)} held-out responses of the teacher"):
            _write(path, _sample(run, prompts, names))
        written = _read(path)
        assert written is not None
    return HeldOutSet(prompts, written)


def _samples_here(run: Run) -> bool:
    return local_teacher(run) is not None and run.config.teacher.scorer == "transformers"


def _identity(run: Run, prompts: HeldOut, names: Sequence[str]) -> str:
    fields: dict[str, Any] = {
        "seed": run.config.run.seed,
        "prompts": token_digest(prompts.prompts),
        "of": prompts.teachers,
        "teachers": teacher_fields(run),
        "stops": [stop_fields(with_only(run, name), "teacher") for name in names],
        "max_tokens": run.config.evaluation_max_tokens,
        "k": run.config.scores.k,
    }
    if told := context_fields(run, prompts.prompts):
        fields["told"] = told
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sample(run: Run, prompts: HeldOut, names: Sequence[str]) -> list[TeacherResponse]:
    slot = EngineSlot(
        run,
        "teacher",
        batch_size=run.config.evaluation.batch_size,
        batch_tokens=run.config.scores.batch_tokens,
    )
    found = []
    for name in names:
        engine, tokenizer = slot.open(name, to_score=True)
        responses = sample_responses(run, engine, tokenizer, prompts.of(name), "teacher")
        responses = [response for response in responses if response.tokens]
        answers = ask_engine(engine, as_told(prompts, responses), k=run.config.scores.k)
        found += [
            TeacherResponse(list(response.prompt_tokens), list(response.tokens), answer.alternatives)
            for response, answer in zip(responses, answers, strict=True)
        ]
        del engine
    slot.close()
    return found


def _write(path: Path, responses: Sequence[TeacherResponse]) -> None:
    path.parent.mkdir(exist_ok=True)
    columns = {
        "prompt_tokens": pa.array([r.prompt_tokens for r in responses], pa.list_(pa.int32())),
        "tokens": pa.array([r.tokens for r in responses], pa.list_(pa.int32())),
        "ids": pa.array([r.alternatives.ids.reshape(-1) for r in responses], pa.list_(pa.int32())),
        "logprobs": pa.array(
            [r.alternatives.logprobs.reshape(-1) for r in responses], pa.list_(pa.float32())
        ),
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd", write_page_checksum=True)


def _read(path: Path) -> list[TeacherResponse] | None:
    """None if no such file exists, or no whole one."""
    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return [
        TeacherResponse(
            row["prompt_tokens"],
            row["tokens"],
            DenseTopk(
                np.array(row["ids"], dtype=np.int32).reshape(len(row["tokens"]), -1),
                np.array(row["logprobs"], dtype=np.float32).reshape(len(row["tokens"]), -1),
            ),
        )
        for row in rows
    ]
