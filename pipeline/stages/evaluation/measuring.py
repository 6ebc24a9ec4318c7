"""Distances of students and their teacher per prompt, in ``distance-<who>.parquet`` of the ``eval`` stage.

A teacher of transformers on this machine is loaded beside the student, for the sums over the vocabulary need both. Of
another (in vLLM, or a service whose model is not here) everything is asked first, and vLLM's memory is freed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.models.stops import stop_ids
from tropd.pipeline.run.opening import check_pair, load_role, role_num_tokens, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.distance import (
    TokenDistances,
    exact_distances,
    sampled_distances,
    topk_distances,
)
from tropd.pipeline.stages.evaluation.held_out import (
    HeldOut,
    as_told,
    responses_file,
    sample_responses,
    sequences_of,
)
from tropd.pipeline.stages.evaluation.teacher_answers import TeacherAnswer, ask_engine, ask_service
from tropd.pipeline.teacher.by_domain import EngineSlot, with_only
from tropd.pipeline.teacher.connect import connect_teacher, local_teacher
from tropd.storage.catalog import DISTANCE, DISTANCES
from tropd.storage.disk.atomic import atomic_file
from tropd.storage.errors import TropdError
from tropd.storage.formats.trajectories import Trajectory, read_trajectories, write_trajectories
from tropd.storage.stage.stage import Stage

Responses = dict[str, Trajectory]
"""By the prompt's id."""
ROWS_PER_CALL = 16
"""Responses between two signs of progress. It decides how rows are padded, so it is fixed."""
_SMALLER = "lower scores.batch_tokens, or measure on shorter responses (evaluation.max_tokens)"


def distance_file(who: str) -> str:
    """Name of the file of a student's distances, in the stage's folder."""
    return f"{DISTANCE}{who}.parquet"


def check_teachers(run: Run, held_out: HeldOut) -> None:
    """Refuse teachers that have other tokens than the student, before anything is loaded.

    Raises:
        ConfigError: with the first differences.
    """
    for name in _local(run, held_out):
        check_pair(with_only(run, name))


def write_responses(stage: Stage, who: str, responses: Sequence[Trajectory]) -> None:
    """Commit a model's responses."""
    name = responses_file(who)
    stage.commit(name, rows=write_trajectories(stage.folder / name, responses))


def read_responses(folder: Path, who: str) -> Responses:
    """A model's stored responses; none where no such file exists."""
    path = folder / responses_file(who)
    rows = read_trajectories(path) if path.exists() else ()
    return {row.prompt_id: row for row in rows if row.tokens}


def measure_distances(
    run: Run, stage: Stage, held_out: HeldOut, students: Mapping[str, Path | None], slot: EngineSlot
) -> None:
    """Commit the teacher's responses, and the distances of every student, from its own responses, that has none yet.

    Args:
        students: where the weights of each are, if not where the role's own are.
        slot: of teachers; one may stay open.
    """
    local = _local(run, held_out)
    if local and not stage.has(responses_file("teacher")):
        found = []
        for name in local:
            engine, tokenizer = slot.open(name)
            found += sample_responses(run, engine, tokenizer, held_out.of(name), "teacher")
        write_responses(stage, "teacher", found)
    missing = [who for who in students if not stage.has(distance_file(who))]
    asked = _ask(run, stage.folder, held_out, missing, slot)
    for who in missing:
        rows = _measure_one(run, stage.folder, held_out, who, students[who], slot, asked)
        path = stage.folder / distance_file(who)
        with atomic_file(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=DISTANCES), temporary, compression="zstd")
        stage.commit(path.name, rows=len(rows))


def _local(run: Run, held_out: HeldOut) -> list[str]:
    """Names of the teachers whose models are on this machine."""
    names = dict.fromkeys(held_out.teachers)
    return [name for name in names if local_teacher(with_only(run, name)) is not None]


def exact_teachers(run: Run, held_out: HeldOut) -> list[str]:
    """Names of the teachers whose probabilities of all tokens are available here."""
    return [
        name for name in _local(run, held_out) if with_only(run, name).config.teacher.scorer == "transformers"
    ]


Asked = dict[tuple[str, str], TeacherAnswer]
"""By the response's author, and its prompt's id."""


def _ask(run: Run, folder: Path, held_out: HeldOut, students: Sequence[str], slot: EngineSlot) -> Asked:
    """Answers of the other teachers about the responses of students, and about their own."""
    names = [name for name in dict.fromkeys(held_out.teachers) if name not in exact_teachers(run, held_out)]
    answers: Asked = {}
    for name in names if students else []:
        own, prompts = with_only(run, name), held_out.of(name)
        ids = {prompt.id for prompt in prompts.prompts}
        for who in (*students, "teacher"):
            responses = [r for r in read_responses(folder, who).values() if r.prompt_id in ids]
            k = run.config.scores.k if who == "teacher" else 0
            if local_teacher(own) is not None:
                found = ask_engine(slot.open(name, to_score=True)[0], as_told(prompts, responses), k=k)
            else:
                found = _ask_service(own, prompts, responses, k)
            answers |= {(who, r.prompt_id): a for r, a in zip(responses, found, strict=True)}
    if names:
        slot.close()
    return answers


def _ask_service(run: Run, prompts: HeldOut, responses: Sequence[Trajectory], k: int) -> list[TeacherAnswer]:
    tokenizer = role_tokenizer(run, "student")
    with ExitStack() as stack:
        client = connect_teacher(
            run,
            stack,
            started=None,
            tokenizer=tokenizer,
            stop_ids=stop_ids(run.workspace, run.config, "student"),
            needed_length=max(len(one.scored_after) for one in prompts.prompts)
            + run.config.evaluation_max_tokens,
            on_wait=run.reporter.warning,
            sleep=time.sleep,
        )
        return ask_service(
            client, as_told(prompts, responses), k=k, vocab_limit=role_num_tokens(run, "student")
        )


def _measure_one(
    run: Run,
    folder: Path,
    held_out: HeldOut,
    who: str,
    weights: Path | None,
    slot: EngineSlot,
    asked: Asked,
) -> list[dict[str, Any]]:
    """Rows of one student's file."""
    student = load_role(run, "student", weights).engine(
        batch_size=1, batch_tokens=run.config.scores.batch_tokens
    )
    written = {author: read_responses(folder, author) for author in (who, "teacher")}
    exact = exact_teachers(run, held_out)
    rows = []
    with run.reporter.task(f"distance {who}", sum(map(len, written.values())), unit="responses") as task:
        for name in dict.fromkeys(held_out.teachers):
            if name in exact:
                compare = partial(_compared, run, held_out, student, slot.open(name, to_score=True)[0])
            else:
                compare = partial(_derived, run, student, asked)
            prompts = held_out.of(name).prompts
            found: dict[str, dict[str, TokenDistances]] = {}
            for author, responses in written.items():
                mine = [responses[prompt.id] for prompt in prompts if prompt.id in responses]
                found[author] = {}
                for low in range(0, len(mine), ROWS_PER_CALL):
                    part = mine[low : low + ROWS_PER_CALL]
                    with within_memory("distances over the vocabulary", _SMALLER):
                        distances = compare(author, part)
                    _check(who, author, part, distances)
                    found[author] |= {r.prompt_id: d for r, d in zip(part, distances, strict=True)}
                    task.advance(len(part))
            rows += [
                {"who": who, "prompt_id": prompt.id, "method": "exact" if name in exact else "topk"}
                | _columns("student", "reverse_kl", written[who], found[who], prompt.id)
                | _columns("teacher", "forward_kl", written["teacher"], found["teacher"], prompt.id)
                for prompt in prompts
            ]
    return rows


def _check(
    who: str, author: str, responses: Sequence[Trajectory], distances: Sequence[TokenDistances]
) -> None:
    for response, found in zip(responses, distances, strict=True):
        if not np.isfinite(found.kl).all():
            writer = "teacher's" if author == "teacher" else "student's"
            raise TropdError(
                f"the distance of the student {who} training is not a number on the {writer} response to prompt "
                f"{response.prompt_id!r}: one of the two models gives NaN",
                hint='try student.dtype = "float32" and teacher.dtype = "float32"',
            )


def _compared(
    run: Run,
    held_out: HeldOut,
    student: TransformersEngine,
    teacher: Engine,
    author: str,
    responses: Sequence[Trajectory],
) -> list[TokenDistances]:
    assert isinstance(teacher, TransformersEngine)
    own, told = sequences_of(responses), sequences_of(as_told(held_out, responses))
    batch_tokens = run.config.scores.batch_tokens
    if author == "teacher":
        return exact_distances(teacher, student, *told, batch_tokens=batch_tokens, told=own)
    return exact_distances(student, teacher, *own, batch_tokens=batch_tokens, told=told)


def _derived(
    run: Run, student: TransformersEngine, asked: Asked, author: str, responses: Sequence[Trajectory]
) -> list[TokenDistances]:
    answers = [asked[author, response.prompt_id] for response in responses]
    sequences, starts = sequences_of(responses)
    if author == "teacher":
        batch_tokens = run.config.scores.batch_tokens
        return topk_distances(
            student, sequences, starts, [a.alternatives for a in answers], batch_tokens=batch_tokens
        )
    scores = student.score(sequences, starts, entropy=True)
    return [
        sampled_distances(s.token_logprobs, a.logprobs, s.entropy)
        for s, a in zip(scores, answers, strict=True)
    ]


def _columns(
    author: str, kl: str, responses: Responses, found: Mapping[str, TokenDistances], prompt_id: str
) -> dict[str, Any]:
    """Means over the tokens of a response; nothing where none exists."""
    if prompt_id not in found:
        return {}
    response, distances = responses[prompt_id], found[prompt_id]
    means = {kl: distances.kl, "acceptance": distances.acceptance, f"{author}_entropy": distances.entropy}
    if author == "teacher":
        del means["acceptance"]
    return {
        f"{author}_tokens": len(response.tokens),
        f"{author}_finish_reason": response.finish_reason,
        **{name: None if values is None else float(values.mean()) for name, values in means.items()},
    }
