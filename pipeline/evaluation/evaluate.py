"""The ``evaluate`` stage: accuracy on held-out problems of the student before and after, and of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.context import (
    Run,
    data_fields,
    engine_fields,
    evaluation_problems,
    finished,
    model_fields,
    open_engine,
    section_fields,
)
from tropd.pipeline.engines.base import Engine, Sampling
from tropd.pipeline.evaluation.grading import extract_answer, is_correct
from tropd.pipeline.prompts import Prompt
from tropd.storage.atomic import atomic_file
from tropd.storage.fingerprint import Fingerprint
from tropd.storage.manifest import Manifest, check_shard
from tropd.storage.seeds import derive_seed
from tropd.storage.stage import open_stage

STAGE = "eval"
Who = Literal["before", "after", "teacher"]
Mode = Literal["greedy", "sampled"]
WHO: tuple[Who, ...] = ("before", "after", "teacher")

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


def fingerprint(run: Run, final: Path, whom: Sequence[Who]) -> Fingerprint:
    """Problems, sampling, and the weights of all models evaluated."""
    config = run.config
    fields = data_fields(run, "evaluation")
    fields |= section_fields("evaluation", config.evaluation, without={"batch_size", "max_tokens"})
    fields |= {"run.seed": config.run.seed, "evaluation.max_tokens": config.evaluation_max_tokens}
    for who in whom:
        role, folder = _model_of(who, final)
        of_model = model_fields(run, role, folder) | engine_fields(run, role)
        fields |= {f"{who}.{k}": v for k, v in of_model.items()}
    return Fingerprint(fields)


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
    with open_stage(folder, STAGE, fingerprint(run, final, whom), force=force, timings=run.timings) as stage:
        if stage.complete:
            run.reporter.info("evaluate: done before, nothing to do")
            return stage.manifest
        summary: dict[str, dict[str, float]] = {}
        for who in whom:
            name = f"part-{who}.parquet"
            if not stage.has(name):
                responses = _evaluate_one(run, who, *_model_of(who, final))
                _write(folder / name, who, responses)
                stage.commit(name, rows=len(responses))
            table = pq.read_table(folder / name, columns=["mode", "correct"])
            summary[who] = {}
            for mode in ("greedy", "sampled"):
                marks = [c for m, c in zip(*table.to_pydict().values(), strict=True) if m == mode]
                summary[who][mode] = sum(marks) / max(len(marks), 1)
        stage.finish(accuracy=summary)
        return stage.manifest


def _evaluate_one(run: Run, who: Who, role: str, folder: Path | None) -> list[Response]:
    config = run.config.evaluation
    engine, tokenizer = open_engine(run, role, folder, batch_size=config.batch_size)
    problems, encoded = evaluation_problems(run, tokenizer, engine.max_length, config.limit)
    responses: list[Response] = []
    with run.reporter.task(f"evaluate {who}", len(problems) * (1 + config.samples), unit="responses") as task:
        modes: tuple[tuple[Mode, int], ...] = (("greedy", 1), ("sampled", config.samples))
        for mode, samples in modes:
            for low in range(0, len(problems), config.batch_size):
                part = slice(low, low + config.batch_size)
                responses += respond(run, engine, tokenizer, problems[part], encoded[part], mode, samples)
                task.advance(len(problems[part]) * samples)
    return responses


def respond(
    run: Run,
    engine: Engine,
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
    generations = engine.generate(
        [tokens for _, tokens, _ in jobs],
        Sampling(
            0.0 if greedy else config.evaluation.temperature, 1.0 if greedy else config.evaluation.top_p
        ),
        seeds=[derive_seed(config.run.seed, STAGE, problem.id, sample) for problem, _, sample in jobs],
        max_tokens=[config.evaluation_max_tokens] * len(jobs),
    )
    pattern = config.evaluation.answer_pattern
    responses = []
    for (problem, _, sample), generation in zip(jobs, generations, strict=True):
        text = tokenizer.decode(generation.tokens, skip_special_tokens=True)
        responses.append(
            Response(
                mode=mode,
                prompt_id=problem.id,
                sample_index=sample,
                response=text,
                answer=extract_answer(text, pattern),
                expected=problem.answer or "",
                correct=is_correct(text, problem.answer, pattern),
                num_tokens=len(generation.tokens),
                finish_reason=generation.finish_reason,
            )
        )
    return responses


def _write(path: Path, who: Who, responses: Sequence[Response]) -> None:
    rows = [{"who": who, **vars(r)} for r in responses]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")
