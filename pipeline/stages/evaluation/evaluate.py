"""The ``evaluate`` stage: accuracy of students and teacher on held-out problems, and their distances.

The problems of ``[evaluation]`` that have an answer are answered once by greedy decoding and n times by sampling, in
``part-<who>.parquet``; those of each benchmark n times by sampling, in ``<benchmark>/part-<who>.parquet``. While a model
is evaluated, its responses are committed batch by batch (``…-00000.parquet``), so that a killed stage loses one batch.
Distances are in ``distance-<who>.parquet``, the responses that they were measured on in ``responses-<who>.parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.base import Sampler
from tropd.pipeline.problems.grading.grading import RULES
from tropd.pipeline.run.identity import (
    engine_fields,
    fingerprint_of,
    harness_model_fields,
    model_fields,
    section_fields,
    stop_fields,
    tell_unrecorded,
    template_fields,
    token_fields,
)
from tropd.pipeline.run.opening import open_engine, role_room, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import data_fields, evaluation_problems
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.stages.evaluation.distance_summary import summarize_distance
from tropd.pipeline.stages.evaluation.harness.judging import check_judges, judge, judged, judged_fields
from tropd.pipeline.stages.evaluation.held_out import (
    NUM_PROMPTS,
    TEACHER,
    HeldOut,
    held_out_fields,
    held_out_prompts,
    responses_file,
    sample_responses,
    tell_ungraded,
)
from tropd.pipeline.stages.evaluation.lm_eval import check_harness, harness_fields, run_task
from tropd.pipeline.stages.evaluation.measuring import (
    check_teachers,
    measure_distances,
    read_responses,
    write_responses,
)
from tropd.pipeline.stages.evaluation.pieces import (
    Problems,
    drop_pieces,
    join_pieces,
    make_on_gpus,
    make_part,
    make_piece,
    part_file,
    pieces_of,
)
from tropd.pipeline.stages.evaluation.statistics import average, pass_at
from tropd.pipeline.stages.shards import HERE, Execution
from tropd.pipeline.teacher.by_domain import GENERAL, EngineSlot
from tropd.pipeline.teacher.connect import local_teacher
from tropd.storage.errors import unknown_name
from tropd.storage.formats.trajectories import Trajectory
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.job_parts import remove_parts
from tropd.storage.stage.manifest import Manifest, check_shard
from tropd.storage.stage.stage import Stage, open_stage
from tropd.storage.workspace import EVALUATED, Who

STAGE = "eval"


def read_problems(run: Run, whom: Sequence[Who]) -> Problems:
    """All problems, as the evaluated models read them.

    Raises:
        DataError: a file is missing, or holds unusable problems.
    """
    found = {}
    for role in dict.fromkeys("teacher" if who == "teacher" else "student" for who in whom):
        tokenizer, longest = role_tokenizer(run, role), role_room(run, role)
        for name in run.config.evaluation_sets:
            found[name, role] = evaluation_problems(run, tokenizer, longest, name, role)
    return found


def fingerprint(run: Run, final: Path, whom: Sequence[Who], problems: Problems) -> Fingerprint:
    """Problems as each model reads them, sampling, and the weights of all models evaluated."""
    config = run.config
    fields: dict[str, Scalar] = {"run.seed": config.run.seed, "evaluation.grading_rules": RULES}
    for name, settings in config.evaluation_sets.items():
        prefix = f"benchmark.{name}." if name else ""
        own = data_fields(run, "evaluation", name)
        own |= section_fields("evaluation", settings)
        own["evaluation.max_tokens"] = settings.max_tokens or config.rollout.max_tokens
        fields |= {f"{prefix}{k}": v for k, v in own.items()}
    fields |= judged_fields(run) | harness_fields(run) | held_out_fields(run, problems.get(("", "student")))
    for who in whom:
        role, folder = _model_of(who, final)
        of_model = model_fields(run, role, folder) | stop_fields(run, role, folder) | engine_fields(run, role)
        if config.evaluation.harness:
            of_model |= harness_model_fields(run, role, folder)
        for name in config.evaluation_sets:
            prefix = f"benchmark.{name}." if name else ""
            of_model |= template_fields(run, role)
            of_model |= token_fields(problems[name, role], f"{prefix}data.evaluation")
        fields |= {f"{who}.{k}": v for k, v in of_model.items()}
    return fingerprint_of(run, fields)


def _model_of(who: Who, final: Path) -> tuple[str, Path | None]:
    """Role whose settings apply, and the directory if it is not the role's own."""
    return ("teacher" if who == "teacher" else "student"), (final if who == "after" else None)


def evaluate(
    run: Run, *, whom: Sequence[Who] = EVALUATED, force: bool = False, execution: Execution = HERE
) -> Manifest:
    """Evaluate the models that have not been evaluated yet and return the finished manifest.

    Parts, and processes with GPUs of their own, make responses only, and the manifest of a part is not complete: all else
    is measured where the stage is completed.

    Raises:
        ConfigError: ``whom`` has a name that is not in ``EVALUATED``.
        TropdError: the student after training is asked for, and training is not finished.
        DamagedShardError: that student is not the one training wrote; or a file of an earlier evaluation is damaged.
    """
    for who in whom:
        if who not in EVALUATED:
            raise unknown_name("role", who, EVALUATED)
    final = run.workspace.stage("train") / "final"
    if "after" in whom:
        check_shard(final.parent, finished(run, "train").shards[final.name])
    whom = _present(run, whom)
    folder = run.workspace.stage(STAGE)
    problems = read_problems(run, whom)
    identity = fingerprint(run, final, whom, problems)
    if execution.part is not None:
        open_one = partial(_open, run, final)
        return make_part(run, STAGE, identity, whom, problems, execution.part, open_one)
    with open_stage(folder, STAGE, identity, force=force, timings=run.timings) as stage:
        measures = run.config.evaluation.distance_prompts > 0 and NUM_PROMPTS not in stage.unrecorded
        stage.unrecorded = [name for name in stage.unrecorded if name not in (NUM_PROMPTS, TEACHER)]
        tell_unrecorded(run, stage)
        if not measures and run.config.evaluation.distance_prompts:
            run.reporter.info(
                f"evaluate: {folder} was begun by an older version of tropd, which did not measure distances to the "
                "teacher; --force evaluates anew, with them"
            )
        # Small files, of which all figures are made: also those of a run that ended are read before they count.
        for shard in stage.manifest.shards.values():
            check_shard(folder, shard)
        if stage.complete:
            run.reporter.info("evaluate: done before, nothing to do")
            return stage.manifest
        check_harness(run)
        check_judges(run)
        tell_ungraded(run, next(found.prompts for (name, _), found in problems.items() if not name))
        students: dict[str, Path | None] = {who: _model_of(who, final)[1] for who in whom if who != "teacher"}
        held_out = None
        if measures and students:
            held_out = held_out_prompts(run, problems["", "student"])
            check_teachers(run, held_out)
        make_on_gpus(run, stage, whom, problems, execution.gpus)
        for who in (who for who in whom if who != "teacher"):
            _evaluate_one(run, stage, who, problems, held_out, partial(_open, run, final, who))
        slot = EngineSlot(
            run,
            "teacher",
            batch_size=run.config.evaluation.batch_size,
            batch_tokens=run.config.scores.batch_tokens,
        )
        if held_out is not None:
            measure_distances(run, stage, held_out, students, slot)
        if "teacher" in whom:
            _evaluate_one(run, stage, "teacher", problems, held_out, partial(slot.open, GENERAL))
        slot.close()
        _run_harness(run, stage, whom, final)
        drop_pieces(stage)
        _tell_unanswered(run, folder, whom)
        stage.finish(**summarize(run, folder, whom))
        remove_parts(folder)
        return stage.manifest


def _present(run: Run, whom: Sequence[Who]) -> Sequence[Who]:
    """Those whose models are on this machine: a teacher may be elsewhere."""
    if "teacher" not in whom or local_teacher(run) is not None:
        return whom
    run.reporter.warning(
        f"teacher.model = {run.config.teacher.model!r} is not on this machine: the teacher is not evaluated, and the "
        "forward KL, which needs its responses, is not measured"
    )
    return [who for who in whom if who != "teacher"]


def _open(run: Run, final: Path, who: Who) -> tuple[Sampler, Any]:
    return open_engine(run, *_model_of(who, final), batch_size=run.config.evaluation.batch_size)


def _tell_unanswered(run: Run, folder: Path, whom: Sequence[Who]) -> None:
    """Warn of sets where no model's response has an answer: the grader does not fit then."""
    graded = {name: one for name, one in run.config.evaluation_sets.items() if name not in judged(run.config)}
    for name, settings in graded.items():
        answers = [pq.read_table(folder / part_file(name, who), columns=["answer"])["answer"] for who in whom]
        if any(len(column) for column in answers) and all(c.null_count == len(c) for c in answers):
            rule = " with evaluation.answer_pattern" if settings.grader == "pattern" else ""
            run.reporter.warning(
                f"{name or 'evaluation'}: no response of {', '.join(whom)} has an answer that the grader "
                f"{settings.grader!r} finds{rule}, so 0 % says nothing about them; "
                "tropd config explain evaluation.grader shows the others"
            )


def _evaluate_one(
    run: Run,
    stage: Stage,
    who: Who,
    problems: Problems,
    held_out: HeldOut | None,
    open_model: Callable[[], tuple[Sampler, Any]],
) -> None:
    """Responses of one model to the sets of problems that it lacks, each batch of them committed; a student's to the
    held-out prompts first."""
    names = [name for name in run.config.evaluation_sets if not stage.has(part_file(name, who))]
    responds = held_out is not None and who != "teacher" and not stage.has(responses_file(who))
    if not names and not responds:
        return
    pieces = {name: pieces_of(run, who, name, problems) for name in names}
    engine, tokenizer = None, None
    if responds or any(not stage.has(piece.name) for group in pieces.values() for piece in group):
        engine, tokenizer = open_model()
    if held_out is not None and responds:
        assert engine is not None
        write_responses(stage, who, sample_responses(run, engine, tokenizer, held_out, "student"))
    # What a teacher has written in a context of its own is no answer to the bare problem.
    comparable = held_out is not None and not (who == "teacher" and run.config.teacher.context is not None)
    known = _known(stage.folder, who, held_out) if held_out is not None and comparable else {}
    with run.reporter.task(
        f"evaluate {who}", sum(p.size for g in pieces.values() for p in g), unit="responses"
    ) as task:
        for name, group in pieces.items():
            for piece in group:
                if not stage.has(piece.name):
                    assert engine is not None
                    make_piece(run, stage, who, piece, engine, tokenizer, {} if name else known)
                task.advance(piece.size)
            join_pieces(stage, who, name, group, partial(judge, run, name, who))


def _known(folder: Path, who: Who, held_out: HeldOut) -> Mapping[str, Trajectory]:
    """Its responses to held-out prompts; some of a teacher's may be another's, of their domain."""
    own = held_out.of(GENERAL) if who == "teacher" else held_out
    ids = {prompt.id for prompt in own.prompts}
    return {name: found for name, found in read_responses(folder, who).items() if name in ids}


def _run_harness(run: Run, stage: Stage, whom: Sequence[Who], final: Path) -> None:
    """Every task on every model; each of them is committed by itself."""
    jobs = [(task, who) for task in run.config.evaluation.harness for who in whom]
    if not jobs:
        return
    with run.reporter.task("lm-eval", len(jobs), unit="tasks") as progress:
        for task, who in jobs:
            name = _harness_part(task.name, who)
            if not stage.has(name):
                role, folder = _model_of(who, final)
                folder = folder or model_directory(run.workspace, getattr(run.config, role), role)
                log = run.workspace.logs / "lm-eval" / f"{task.name}-{who}.log"
                metrics = run_task(run, task, role, folder, stage.folder / name, log)
                stage.commit(name, rows=len(metrics))
            progress.advance(1, task=task.name, who=who)


def _harness_part(name: str, who: Who) -> str:
    return f"{name}/harness-{who}.json"


def summarize(run: Run, folder: Path, whom: Sequence[Who]) -> dict[str, Any]:
    """Accuracy per model and mode; avg@n and pass@k with their intervals, also of the benchmarks; lm-eval's metrics; and
    distances to the teacher. Where no problem has an answer, accuracy is None, without avg@n."""
    accuracy: dict[str, dict[str, float | None]] = {}
    sampled: dict[str, dict[str, Any]] = {}
    for name, settings in run.config.evaluation_sets.items():
        for who in whom:
            marks = read_marks(folder / part_file(name, who))
            if not name:
                accuracy[who] = {mode: _share(marks.get(mode, {})) for mode in ("greedy", "sampled")}
            if not marks:
                continue
            correct = list(marks["sampled"].values())
            sampled.setdefault(name or STAGE, {})[who] = {
                "samples": settings.samples,
                "problems": len(correct),
                "average": asdict(average(correct, seed=run.config.run.seed)),
                "pass_at": {
                    str(k): asdict(pass_at(k, correct, seed=run.config.run.seed)) for k in settings.pass_at
                },
            }
    harness = {
        task.name: {
            who: json.loads((folder / _harness_part(task.name, who)).read_text(encoding="utf-8"))
            for who in whom
        }
        for task in run.config.evaluation.harness
    }
    distance = summarize_distance(folder, whom, run.config.run.seed)
    return {
        "accuracy": accuracy,
        "sampled": sampled,
        **({"distance": distance} if distance else {}),
        **({"harness": harness} if harness else {}),
    }


def read_marks(path: Path) -> dict[str, dict[str, list[bool]]]:
    """An evaluation's file as mode → problem → which of its responses are right."""
    found: dict[str, dict[str, list[bool]]] = {}
    for row in pq.read_table(path, columns=["mode", "prompt_id", "correct"]).to_pylist():
        found.setdefault(row["mode"], {}).setdefault(row["prompt_id"], []).append(row["correct"])
    return found


def _share(marks: dict[str, list[bool]]) -> float | None:
    every = [mark for group in marks.values() for mark in group]
    return sum(every) / len(every) if every else None
