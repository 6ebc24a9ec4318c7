"""The ``evaluate`` stage: accuracy on held-out problems of the student before and after, and of the teacher.

The problems of ``[evaluation]`` are answered once by greedy decoding and n times by sampling, in ``part-<who>.parquet``;
those of each benchmark n times by sampling, in ``<benchmark>/part-<who>.parquet``. While a model is evaluated, its
responses are committed batch by batch (``…-00000.parquet``), so that a killed stage loses one batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.config import EvaluationConfig
from tropd.pipeline.context import (
    Run,
    engine_fields,
    finished,
    model_fields,
    open_engine,
    role_room,
    role_tokenizer,
    section_fields,
)
from tropd.pipeline.engines.base import Sampler, Sampling
from tropd.pipeline.evaluation.grading import RULES, check_expected, grade
from tropd.pipeline.evaluation.harness import check_harness, harness_fields, run_task
from tropd.pipeline.evaluation.statistics import average, pass_at
from tropd.pipeline.identity import (
    fingerprint_of,
    harness_model_fields,
    stop_fields,
    tell_unrecorded,
    token_fields,
)
from tropd.pipeline.memory import within_memory
from tropd.pipeline.models import model_directory
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.problems.selection import data_fields, evaluation_problems
from tropd.pipeline.prompts import Prompt
from tropd.storage.atomic import atomic_file
from tropd.storage.fingerprint import Fingerprint, Scalar
from tropd.storage.manifest import Manifest, check_shard
from tropd.storage.seeds import derive_seed
from tropd.storage.stage import Stage, open_stage

STAGE = "eval"
Who = Literal["before", "after", "teacher"]
Mode = Literal["greedy", "sampled"]
WHO: tuple[Who, ...] = ("before", "after", "teacher")

_PIECE = re.compile(r"part-[a-z]+-\d{5}\.parquet$")

SCHEMA = pa.schema(
    [
        pa.field("who", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("expected", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
    ],
    metadata={b"tropd.schema": b"evaluations", b"tropd.schema_version": b"1"},
)


@dataclass(frozen=True)
class Response:
    """One graded response."""

    mode: Mode
    prompt_id: str
    sample_index: int
    response: str
    answer: str | None
    expected: str
    correct: bool
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class _Batch:
    """Problems whose responses are sampled and committed together."""

    mode: Mode
    samples: int
    problems: Sequence[Prompt]
    encoded: Sequence[Sequence[int]]


Problems = Mapping[tuple[str, str], Encoded]
"""Problems by the name of their set and the role whose tokenizer encodes them."""


def read_problems(run: Run, whom: Sequence[Who]) -> Problems:
    """All problems, as those who are evaluated read them.

    Raises:
        DataError: a file is missing, or holds what cannot be used.
    """
    found = {}
    for role in dict.fromkeys("teacher" if who == "teacher" else "student" for who in whom):
        tokenizer, longest = role_tokenizer(run, role), role_room(run, role)
        for name, settings in run.config.evaluation_sets.items():
            found[name, role] = evaluation_problems(run, tokenizer, longest, settings.limit, name)
    return found


def fingerprint(run: Run, final: Path, whom: Sequence[Who], problems: Problems) -> Fingerprint:
    """Problems as each model reads them, sampling, and the weights of all models evaluated."""
    config = run.config
    fields: dict[str, Scalar] = {"run.seed": config.run.seed, "evaluation.grading_rules": RULES}
    for name, settings in config.evaluation_sets.items():
        prefix = f"benchmark.{name}." if name else ""
        own = data_fields(run, "evaluation", name)
        own |= section_fields(
            "evaluation",
            settings,
            without={"batch_size", "max_tokens", "pass_at", "benchmarks", "harness", "grading_seconds"},
        )
        own["evaluation.max_tokens"] = settings.max_tokens or config.rollout.max_tokens
        fields |= {f"{prefix}{k}": v for k, v in own.items()}
    fields |= harness_fields(run)
    for who in whom:
        role, folder = _model_of(who, final)
        of_model = model_fields(run, role, folder) | stop_fields(run, role, folder) | engine_fields(run, role)
        if config.evaluation.harness:
            of_model |= harness_model_fields(run, role, folder)
        for name in config.evaluation_sets:
            prefix = f"benchmark.{name}." if name else ""
            of_model |= token_fields(problems[name, role], f"{prefix}data.evaluation")
        fields |= {f"{who}.{k}": v for k, v in of_model.items()}
    return fingerprint_of(run, fields)


def _model_of(who: Who, final: Path) -> tuple[str, Path | None]:
    """Role whose settings apply, and the directory if it is not the role's own."""
    return ("teacher" if who == "teacher" else "student"), (final if who == "after" else None)


def evaluate(run: Run, *, whom: Sequence[Who] = WHO, force: bool = False) -> Manifest:
    """Evaluate whom has not been evaluated yet and return the finished manifest.

    Raises:
        TropdError: the student after training is asked for, and training is not finished.
        DamagedShardError: that student is not what training left.
    """
    final = run.workspace.stage("train") / "final"
    if "after" in whom:
        check_shard(final.parent, finished(run, "train", "train").shards[final.name])
    folder = run.workspace.stage(STAGE)
    problems = read_problems(run, whom)
    identity = fingerprint(run, final, whom, problems)
    with open_stage(folder, STAGE, identity, force=force, timings=run.timings) as stage:
        tell_unrecorded(run, stage)
        if stage.complete:
            run.reporter.info("evaluate: done before, nothing to do")
            return stage.manifest
        check_harness(run)
        for who in whom:
            missing = [n for n in run.config.evaluation_sets if not stage.has(_part(n, who))]
            if missing:
                _evaluate_one(run, stage, who, missing, problems, *_model_of(who, final))
        _run_harness(run, stage, whom, final)
        _drop_pieces(stage)
        _tell_unanswered(run, folder, whom)
        stage.finish(**summarize(run, folder, whom))
        return stage.manifest


def _tell_unanswered(run: Run, folder: Path, whom: Sequence[Who]) -> None:
    """Warn of sets where no response of anybody has an answer: it is the grader that does not fit then."""
    for name, settings in run.config.evaluation_sets.items():
        answers = [pq.read_table(folder / _part(name, who), columns=["answer"])["answer"] for who in whom]
        if all(column.null_count == len(column) for column in answers):
            rule = " with evaluation.answer_pattern" if settings.grader == "pattern" else ""
            run.reporter.warning(
                f"{name or 'evaluation'}: no response of {', '.join(whom)} has an answer that the grader "
                f"{settings.grader!r} finds{rule}, so 0 % says nothing about them; "
                "tropd config explain evaluation.grader shows the others"
            )


def _part(name: str, who: Who) -> str:
    return f"{name}/part-{who}.parquet" if name else f"part-{who}.parquet"


def _evaluate_one(
    run: Run,
    stage: Stage,
    who: Who,
    names: Sequence[str],
    problems: Problems,
    role: str,
    folder: Path | None,
) -> None:
    """Responses of one model to some sets of problems, each batch of them committed."""
    sets = run.config.evaluation_sets
    batches = {name: _batches(sets[name], name, problems[name, role]) for name in names}
    engine, tokenizer = open_engine(run, role, folder, batch_size=run.config.evaluation.batch_size)
    total = sum(len(b.problems) * b.samples for group in batches.values() for b in group)
    with run.reporter.task(f"evaluate {who}", total, unit="responses") as task:
        for name, group in batches.items():
            part = _part(name, who)
            pieces = [f"{part.removesuffix('.parquet')}-{number:05d}.parquet" for number in range(len(group))]
            for piece, batch in zip(pieces, group, strict=True):
                if not stage.has(piece):
                    responses = respond(
                        run,
                        sets[name],
                        engine,
                        tokenizer,
                        batch.problems,
                        batch.encoded,
                        batch.mode,
                        batch.samples,
                    )
                    _write(stage.folder / piece, who, responses)
                    stage.commit(piece, rows=len(responses))
                task.advance(len(batch.problems) * batch.samples)
            tables = [pq.read_table(stage.folder / piece) for piece in pieces]
            _write_table(stage.folder / part, pa.concat_tables(tables))
            stage.commit(part, rows=sum(table.num_rows for table in tables))


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


def _drop_pieces(stage: Stage) -> None:
    """Batches are in their parts by now; what a killed stage has left of them goes too."""
    for piece in [name for name in stage.manifest.shards if _PIECE.search(name)]:
        stage.retire(piece)
    for path in stage.folder.rglob("*.parquet"):
        if _PIECE.search(path.name):
            path.unlink()


def _batches(settings: EvaluationConfig, name: str, problems: Encoded) -> list[_Batch]:
    check_expected(settings.grader, problems.prompts)
    modes: list[tuple[Mode, int]] = [("sampled", settings.samples)]
    if not name:
        modes.insert(0, ("greedy", 1))
    batches = []
    for mode, samples in modes:
        step = max(1, settings.batch_size // samples)
        for low in range(0, len(problems.prompts), step):
            part = slice(low, low + step)
            batches.append(_Batch(mode, samples, problems.prompts[part], problems.tokens[part]))
    return batches


def summarize(run: Run, folder: Path, whom: Sequence[Who]) -> dict[str, Any]:
    """Accuracy per model and mode; avg@n and pass@k with their intervals, also of the benchmarks; lm-eval's metrics."""
    accuracy: dict[str, dict[str, float]] = {}
    sampled: dict[str, dict[str, Any]] = {}
    for name, settings in run.config.evaluation_sets.items():
        for who in whom:
            marks = read_marks(folder / _part(name, who))
            if not name:
                accuracy[who] = {mode: _share(marks.get(mode, {})) for mode in ("greedy", "sampled")}
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
    return {"accuracy": accuracy, "sampled": sampled, **({"harness": harness} if harness else {})}


def read_marks(path: Path) -> dict[str, dict[str, list[bool]]]:
    """An evaluation's file as mode → problem → which of its responses are right."""
    found: dict[str, dict[str, list[bool]]] = {}
    for row in pq.read_table(path, columns=["mode", "prompt_id", "correct"]).to_pylist():
        found.setdefault(row["mode"], {}).setdefault(row["prompt_id"], []).append(row["correct"])
    return found


def _share(marks: dict[str, list[bool]]) -> float:
    every = [mark for group in marks.values() for mark in group]
    return sum(every) / max(len(every), 1)


def respond(
    run: Run,
    settings: EvaluationConfig,
    engine: Sampler,
    tokenizer: Any,
    problems: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
    mode: Mode,
    samples: int,
) -> list[Response]:
    """Graded responses to some problems. Seeds depend on problem and sample, not on the model: paired comparisons."""
    config = run.config
    jobs = [(p, t, i) for p, t in zip(problems, encoded, strict=True) for i in range(samples)]
    greedy = mode == "greedy"
    with within_memory("responses to be evaluated", "lower evaluation.batch_size or evaluation.max_tokens"):
        generations = engine.generate(
            [tokens for _, tokens, _ in jobs],
            Sampling(0.0 if greedy else settings.temperature, 1.0 if greedy else settings.top_p),
            seeds=[derive_seed(config.run.seed, STAGE, problem.id, sample) for problem, _, sample in jobs],
            max_tokens=[settings.max_tokens or config.rollout.max_tokens] * len(jobs),
        )
    texts = [tokenizer.decode(g.written, skip_special_tokens=True) for g in generations]
    marks = grade(
        texts,
        [problem.answer for problem, _, _ in jobs],
        settings,
        cut_off=[generation.finish_reason == "length" for generation in generations],
    )
    return [
        Response(
            mode=mode,
            prompt_id=problem.id,
            sample_index=sample,
            response=text,
            answer=mark.answer,
            expected=problem.answer or "",
            correct=mark.correct,
            num_tokens=len(generation.tokens),
            finish_reason=generation.finish_reason,
        )
        for (problem, _, sample), generation, text, mark in zip(jobs, generations, texts, marks, strict=True)
    ]


def _write(path: Path, who: Who, responses: Sequence[Response]) -> None:
    _write_table(path, pa.Table.from_pylist([{"who": who, **vars(r)} for r in responses], schema=SCHEMA))


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
