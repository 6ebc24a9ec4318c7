"""``tropd doctor``: a few of the run's prompts through all of its parts that compute log-probs.

The student answers them as it would in training, and each part says how likely it finds these answers: the engine that
sampled them, the pass that trains, a plain pass of the same weights, and the student's weights in the place of the
teacher's, with the teacher's settings. All have the same weights, so only rounding is between them, or a fault. Then the
configured teacher, here and through its service, on the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tropd.pipeline.experiments.doctor.differences import (
    Difference,
    FalseOutliers,
    NamedLogprobs,
    advice,
    difference,
    false_outliers,
    meaning,
)
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines import proof
from tropd.pipeline.models.engines.base import Sampler
from tropd.pipeline.models.engines.lean.compiled import compile_layers
from tropd.pipeline.models.runtime import DTYPES, autocast, configure_runtime, evaluation_mode
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.run.opening import loading, open_engine
from tropd.pipeline.run.run import Run, as_scorer
from tropd.pipeline.teacher.by_domain import teacher_of, with_only
from tropd.pipeline.teacher.connect import check_pairs, connect_teachers, local_teacher, start_teachers
from tropd.pipeline.training.inputs import student_prompts
from tropd.pipeline.training.rollout.rows import Row, RowPlan, prompts_of_step, roll_out, sampler_logprobs
from tropd.pipeline.training.rollout.sampler import rollout_engine
from tropd.pipeline.training.signal.ask_teacher import TeacherData, ask_teacher, draw_regions, partition_draws
from tropd.pipeline.training.update.micro_batches import longest_row
from tropd.pipeline.training.update.student import StudentPass, trainable_student
from tropd.pipeline.training.update.trainer_proof import row_logprobs
from tropd.pipeline.training.world import ALONE
from tropd.storage.errors import TropdError
from tropd.storage.seeds import derive_seed

LOG_NAME = "doctor-teacher-service"


@dataclass(frozen=True)
class Examination:
    """Findings of a comparison."""

    prompts: int
    tokens: int
    student_dtype: str
    teacher_dtype: str
    differences: list[Difference]
    outliers: FalseOutliers
    meaning: str
    """The effect of false outliers on a run with the configured objective."""
    advice: list[str]
    """A line for each difference that rounding does not explain."""


@dataclass(frozen=True)
class _Answers:
    """Rows that the student has written, and the log-probs of its own parts."""

    folder: Path
    tokenizer: Any
    stop_ids: frozenset[int]
    rows: list[Row]
    teachers: list[str]
    """Name of each row's teacher."""
    sampler: NamedLogprobs
    trainer: NamedLogprobs
    plain: NamedLogprobs


def examine(run: Run, *, prompts: int, tokens: int) -> Examination:
    """Compare all parts of a run on the student's answers to some of its prompts.

    One model is in memory at a time (two where vLLM samples), besides the service's.

    Args:
        prompts: number of them, at most all.
        tokens: of each answer, at most ``rollout.max_tokens``.

    Raises:
        ConfigError, DataError: as training would.
        TropdError: the student writes nothing.
    """
    config, needs = run.config, teacher_needs(run.config.objective)
    check_pairs(run)
    answers = _answer(run, prompts, tokens)
    rows, limit = answers.rows, _mean_limit(run, "student")
    own = with_only(run, answers.teachers[0])
    name = "the student's weights, scored as the teacher's"
    as_teacher = _scored(name, own, rows, answers.folder)
    differences = [
        difference(answers.trainer, answers.sampler, limit),
        difference(answers.trainer, answers.plain),
        difference(answers.sampler, answers.plain, limit),
        difference(as_teacher, answers.sampler, _mean_limit(run, "student", "teacher")),
    ]
    outlier = None
    if needs.token_logprobs and config.objective.rollouts != "stored":
        answered = _ask_service(run, answers)
        outlier = draw_regions(config.objective, rows, answered).outlier
        here = _scored_here(run, answers)
        if here is not None:
            service = replace(here, name="the teacher's service", logprobs=answered.teacher_logprobs)
            differences.append(difference(service, here, _mean_limit(run, "teacher")))
    sampled = answers.sampler.logprobs
    outliers = false_outliers(config.objective, sampled, as_teacher.logprobs, partition_draws(rows), outlier)
    return Examination(
        prompts=len(rows),
        tokens=len(sampled),
        student_dtype=config.student.dtype,
        teacher_dtype=own.config.teacher.dtype,
        differences=differences,
        outliers=outliers,
        meaning=meaning(config.objective, outliers),
        advice=advice(differences),
    )


def _answer(run: Run, prompts: int, tokens: int) -> _Answers:
    """Load the student as training would, have it answer, and compute the answers' log-probs in all its ways."""
    config = run.config
    device = configure_runtime(config.runtime)
    folder = model_directory(run.workspace, config.student, "student")
    precision = None if config.student.dtype == "float32" else DTYPES[config.student.dtype]
    found = student_prompts(run)
    with loading(run, "student", folder):
        loaded = trainable_student(run, folder, device, ALONE)
    model = loaded.model
    with ExitStack() as stack:
        rolling = rollout_engine(run, stack, loaded, model, folder, precision, ALONE)
        rolling.refresh()
        rows = _roll_out(run, found, rolling.engine, prompts, tokens)
    passes = StudentPass(model, precision, num_tokens(loaded.tokenizer))
    plain = proof.plain_logprobs(model, None, passes.split.limit)
    with run.reporter.waiting("a plain pass over every answer"):
        alone = plain([row.sequence for row in rows], [len(row.context) for row in rows])
    if loaded.compiles:
        compile_layers(model)
    with run.reporter.waiting("the training pass"), evaluation_mode(model), autocast(device, precision):
        trained = row_logprobs(passes, rows, config.train.micro_batch(longest_row(rows)))
    low = precision or model.dtype
    drawn = sampler_logprobs(rows).astype(np.float32)
    whole = str(model.dtype).removeprefix("torch.")
    return _Answers(
        folder=folder,
        tokenizer=loaded.tokenizer,
        stop_ids=loaded.stop_ids,
        rows=rows,
        teachers=[teacher_of(run, found.prompts[row.plan.prompt_index].prompt.domain) for row in rows],
        sampler=NamedLogprobs(f"the sampler ({config.student.engine})", low, drawn),
        trainer=NamedLogprobs("the training pass", low, np.concatenate(trained)),
        plain=NamedLogprobs(f"a plain pass in {whole}", model.dtype, np.concatenate(alone)),
    )


def _roll_out(run: Run, found: Encoded, engine: Sampler, prompts: int, tokens: int) -> list[Row]:
    config = run.config
    chosen = prompts_of_step(0, len(found.prompts), min(prompts, len(found.prompts)), config.run.seed)
    plans = [
        RowPlan(slot, i, found.prompts[i].tokens, (), None, False, derive_seed(config.run.seed, "doctor", i))
        for slot, i in enumerate(chosen)
    ]
    rollout = config.rollout.model_copy(update={"max_tokens": min(tokens, config.rollout.max_tokens)})
    with run.reporter.waiting(f"the student answers {len(plans)} prompts"):
        rows = [row for row in roll_out(plans, engine, rollout) if row.tokens]
    if not rows:
        raise TropdError("the student has no room for a token after these prompts")
    return rows


def _mean_limit(run: Run, *roles: str) -> float | None:
    """Apply the limit of the vLLM settings, since vLLM rounds by its own rules."""
    engines = [getattr(as_scorer(run).config, role).engine for role in roles]
    return run.config.vllm.max_mean_difference if "vllm" in engines else None


def _scored(name: str, run: Run, rows: Sequence[Row], folder: Path | None = None) -> NamedLogprobs:
    """Score rows by the run's one teacher, or by another model with its settings."""
    engine, _ = open_engine(
        as_scorer(run), "teacher", folder, batch_size=1, batch_tokens=run.config.service.batch_tokens
    )
    with run.reporter.waiting(name):
        scores = engine.score([row.sequence for row in rows], [len(row.context) for row in rows])
    return NamedLogprobs(
        name, DTYPES[run.config.teacher.dtype], np.concatenate([one.token_logprobs for one in scores])
    )


def _scored_here(run: Run, answers: _Answers) -> NamedLogprobs | None:
    """The configured teachers in this process; None where one of them is not on this machine."""
    name = "the teacher in this process"
    parts: dict[str, NamedLogprobs] = {}
    for teacher in sorted(set(answers.teachers)):
        own = with_only(run, teacher)
        if local_teacher(own) is None:
            return None
        rows = [row for row, of in zip(answers.rows, answers.teachers, strict=True) if of == teacher]
        parts[teacher] = _scored(name, own, rows)
    pieces = {
        teacher: iter(np.split(part.logprobs, np.cumsum(_lengths(answers, teacher))[:-1]))
        for teacher, part in parts.items()
    }
    coarsest = min((part.precision for part in parts.values()), key=lambda dtype: dtype.itemsize)
    return NamedLogprobs(
        name, coarsest, np.concatenate([next(pieces[teacher]) for teacher in answers.teachers])
    )


def _lengths(answers: _Answers, teacher: str) -> list[int]:
    return [len(row.tokens) for row, of in zip(answers.rows, answers.teachers, strict=True) if of == teacher]


def _ask_service(run: Run, answers: _Answers) -> TeacherData:
    """The service's log-probs of these rows, as a step of training gets them."""
    teachers = {row.plan.slot: name for row, name in zip(answers.rows, answers.teachers, strict=True)}
    with ExitStack() as stack:
        clients = connect_teachers(
            run,
            stack,
            started=start_teachers(run, stack, LOG_NAME),
            tokenizer=answers.tokenizer,
            stop_ids=answers.stop_ids,
            needed_length=max(len(row.sequence) for row in answers.rows),
            on_wait=run.reporter.warning,
            sleep=time.sleep,
        )
        with run.reporter.waiting("the teacher's service scores"):
            return ask_teacher(
                clients,
                answers.rows,
                run.config.objective,
                # The student has chosen no ids: its answers were not made for a step of training.
                replace(teacher_needs(run.config.objective), chosen=0, overlap=False),
                num_tokens(answers.tokenizer),
                teacher_of=lambda row: teachers[row.plan.slot],
            )
