"""Graded responses to problems, and the columns of the files that they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tropd.pipeline.config.sections.evaluation_settings import EvaluationConfig
from tropd.pipeline.models.engines.base import Sampler, Sampling
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.grading.grading import grade
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.held_out import as_generation
from tropd.storage.formats.trajectories import Trajectory
from tropd.storage.seeds import derive_seed
from tropd.storage.workspace import Mode

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


def respond(
    run: Run,
    settings: EvaluationConfig,
    engine: Sampler,
    tokenizer: Any,
    problems: Sequence[EncodedPrompt],
    mode: Mode,
    samples: int,
    known: Mapping[str, Trajectory] = {},
) -> list[Response]:
    """Graded responses to some problems. Seeds depend on problem and sample, not on the model: paired comparisons.

    Args:
        known: stored first responses at temperature 1, by the problem's id.
    """
    config = run.config
    jobs = [(problem, i) for problem in problems for i in range(samples)]
    sampling = Sampling(0.0) if mode == "greedy" else Sampling(settings.temperature, settings.top_p)
    there = {
        number: as_generation(known[problem.id])
        for number, (problem, sample) in enumerate(jobs)
        if sampling.plain
        and sample == 0
        and problem.id in known
        and known[problem.id].prompt_tokens == problem.tokens
    }
    rest = [job for number, job in enumerate(jobs) if number not in there]
    with within_memory("responses to be evaluated", "lower evaluation.batch_size or evaluation.max_tokens"):
        drawn = engine.generate(
            [problem.tokens for problem, _ in rest],
            sampling,
            seeds=[derive_seed(config.run.seed, "eval", problem.id, sample) for problem, sample in rest],
            max_tokens=[settings.max_tokens or config.rollout.max_tokens] * len(rest),
        )
    others = iter(drawn)
    generations = [there[number] if number in there else next(others) for number in range(len(jobs))]
    texts = [tokenizer.decode(g.written, skip_special_tokens=True) for g in generations]
    marks = grade(
        texts,
        [problem.prompt.answer for problem, _ in jobs],
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
            expected=problem.prompt.answer or "",
            correct=mark.correct,
            num_tokens=len(generation.tokens),
            finish_reason=generation.finish_reason,
        )
        for (problem, sample), generation, text, mark in zip(jobs, generations, texts, marks, strict=True)
    ]
