"""Sampling trajectories to disk: the teacher's (stage 1, ``generate-prefixes``), or the student's once and for all.

Teacher trajectories give the prefixes from which the student continues. Student rollouts that are stored and scored
once (``generate-rollouts``, ``score-teacher --source rollouts``) allow training with no teacher alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tropd.pipeline.models.engines.base import Engine, Generation, Sampling
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.objectives.spec import field_marks
from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt
from tropd.pipeline.problems.grading.grading import RULES, check_expected
from tropd.pipeline.run.identity import engine_fields, fingerprint_of, model_fields, stop_fields, token_fields
from tropd.pipeline.run.opening import check_pair
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import data_fields
from tropd.pipeline.stages.refilter import (
    Answered,
    is_whole,
    only_filters_changed,
    open_filter,
    rejects_folder,
    separate,
    write_left_out,
)
from tropd.pipeline.stages.shard_work import Maker, ShardSpec, Work
from tropd.pipeline.stages.shards import HERE, Execution, run_stage
from tropd.pipeline.teacher.by_domain import (
    GENERAL,
    EngineSlot,
    batched,
    fields_of_all,
    grouped,
    teachers_in_use,
    with_only,
)
from tropd.pipeline.teacher.reading import context_fields, prompts_of
from tropd.storage.errors import DataError
from tropd.storage.formats.trajectories import Author, Trajectory, read_trajectories, write_trajectories
from tropd.storage.seeds import derive_seed
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import Manifest, read_manifest
from tropd.storage.stage.stage import Stage

STAGE = "prefixes"
ROLLOUTS_STAGE = "rollouts"
# Rows handed to the engine at once, in batches: between two calls progress is shown.
BATCHES_PER_CALL = 4


@dataclass(frozen=True)
class SamplingJob:
    """Author, sampling settings and target stage, from the section of that author."""

    stage: str
    author: Author
    samples_per_prompt: int
    temperature: float
    top_p: float
    max_tokens: int
    limit: int | None
    keep: Literal["all", "correct"]
    shard_prompts: int
    batch_size: int


@dataclass(frozen=True)
class Batch:
    """The prompts of one shard; they have the same teacher."""

    teacher: str
    prompts: Sequence[EncodedPrompt]


def teacher_source(run: Run) -> SamplingJob:
    """Teacher trajectories, as ``[prefixes]`` says."""
    prefixes = run.config.prefixes
    return SamplingJob(
        stage=STAGE,
        author="teacher",
        samples_per_prompt=prefixes.samples_per_prompt,
        temperature=prefixes.temperature,
        top_p=prefixes.top_p,
        max_tokens=run.config.prefix_max_tokens,
        limit=prefixes.limit,
        keep=prefixes.keep,
        shard_prompts=prefixes.shard_prompts,
        batch_size=prefixes.batch_size,
    )


def student_source(run: Run) -> SamplingJob:
    """Rollouts of the initial student, as ``[rollout]`` says; none is filtered."""
    rollout = run.config.rollout
    return SamplingJob(
        stage=ROLLOUTS_STAGE,
        author="student",
        samples_per_prompt=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.max_tokens,
        limit=None,
        keep="all",
        shard_prompts=run.config.prefixes.shard_prompts,
        batch_size=rollout.batch_size,
    )


def fingerprint(run: Run, source: SamplingJob, prompts: Encoded) -> Fingerprint:
    """Everything that decides the trajectories of these prompts."""
    section = "prefixes" if source.author == "teacher" else "rollout"
    left_out = {"stage", "author"} | field_marks(type(getattr(run.config, section))).keys()
    fields: dict[str, Scalar] = {
        f"{section}.{name}": value for name, value in vars(source).items() if name not in left_out
    }
    fields |= (
        data_fields(run, "prompts") | token_fields(prompts, "data.prompts") | _author_fields(run, source)
    )
    if source.author == "teacher" and any(context.prefixes for context in run.config.teacher.contexts):
        fields |= context_fields(run, prompts.prompts) | {"teacher.context.prefixes": True}
    if run.config.teacher.by_domain:  # shards hold the prompts of one teacher each
        fields["teacher.domains"] = ",".join(own.domain for own in run.config.teacher.by_domain)
    fields["run.seed"] = run.config.run.seed
    if source.keep == "correct":
        fields["evaluation.answer_pattern"] = run.config.evaluation.answer_pattern
        fields["evaluation.grader"] = run.config.evaluation.grader
        fields["evaluation.grading_rules"] = RULES
    return fingerprint_of(run, fields)


def _author_fields(run: Run, source: SamplingJob) -> dict[str, Scalar]:
    def of(run: Run) -> dict[str, Scalar]:
        author = source.author
        return model_fields(run, author) | stop_fields(run, author) | engine_fields(run, author)

    return fields_of_all(run, teachers_in_use(run), of) if source.author == "teacher" else of(run)


def generate_prefixes(run: Run, *, execution: Execution = HERE, force: bool = False) -> Manifest:
    """Generate the teacher trajectories that are missing; returns the manifest (see ``run_stage``).

    Raises:
        ConfigError, DataError: the inputs do not fit; raised before the teacher is loaded.
        DataError: ``keep = "correct"`` left no trajectory at all.
    """
    return _generate(run, teacher_source(run), execution, force)


def generate_rollouts(run: Run, *, execution: Execution = HERE, force: bool = False) -> Manifest:
    """Like ``generate_prefixes``, but the initial student writes."""
    return _generate(run, student_source(run), execution, force)


def _generate(run: Run, source: SamplingJob, execution: Execution, force: bool) -> Manifest:
    for name in teachers_in_use(run):
        check_pair(with_only(run, name))
    found = prompts_of(run, source.author)
    prompts = replace(found, prompts=found.prompts[: source.limit])
    if source.keep == "correct":
        check_expected(run.config.evaluation.grader, [one.prompt for one in prompts.prompts])

    identity = fingerprint(run, source, prompts)
    rejects = rejects_folder(run, identity)
    batches = [
        Batch(name, [prompts.prompts[i] for i in part])
        for name, indices in grouped(run, [one.prompt for one in prompts.prompts])
        for part in batched(indices, source.shard_prompts)
    ]
    made = None if force or execution != HERE else _to_filter(run, source, identity, batches, rejects)

    def plan() -> Work:
        shards = [
            ShardSpec(number, (_shard_name(number),), len(batch.prompts))
            for number, batch in enumerate(batches)
        ]
        opener = partial(open_generator, source, batches, rejects)
        if made is not None:
            asked = [[one.prompt for one in batch.prompts] for batch in batches]
            opener = partial(open_filter, source.stage, made, rejects, source.keep, asked)
        return Work(f"{source.author} {source.stage}", "prompts", shards, opener)

    def finish(stage: Stage) -> None:
        _finish(stage, len(prompts.prompts), source.samples_per_prompt)

    anew = force or made is not None
    return run_stage(run, source.stage, identity, plan, finish, execution=execution, force=anew)


def _to_filter(
    run: Run, source: SamplingJob, identity: Fingerprint, batches: Sequence[Batch], rejects: Path
) -> Manifest | None:
    """The stage on disk, if it is complete, differs from the request only in its filters, and has all that it left
    out."""
    folder = run.workspace.stage(source.stage)
    made = read_manifest(folder)
    changed = only_filters_changed(identity, made) if made is not None and made.complete else []
    expected = [
        {(prompt.id, sample) for prompt in batch.prompts for sample in range(source.samples_per_prompt)}
        for batch in batches
    ]
    if made is None or not changed or len(made.shards) != len(batches):
        return None
    if not is_whole([folder / name for name in sorted(made.shards)], rejects, expected):
        return None
    run.reporter.info(
        f"{source.stage}: only {', '.join(changed)} changed: the stored trajectories are filtered again and nothing is "
        "sampled; the old output is moved aside"
    )
    return made


def open_generator(source: SamplingJob, batches: Sequence[Batch], rejects: Path, run: Run) -> Maker:
    """Return a maker that writes one shard of trajectories after another; the author is loaded at the first."""
    authors = EngineSlot(run, source.author, batch_size=source.batch_size)
    step = max(1, BATCHES_PER_CALL * source.batch_size // source.samples_per_prompt)

    def make(number: int, folder: Path, advance: Callable[[int], None]) -> dict[str, int]:
        batch = batches[number]
        engine, tokenizer = authors.open(batch.teacher if source.author == "teacher" else GENERAL)
        rows: list[Trajectory] = []
        left_out: list[Trajectory] = []
        for low in range(0, len(batch.prompts), step):
            prompts = batch.prompts[low : low + step]
            sampled = _sample(run, source, engine, tokenizer, prompts)
            kept, others = separate(run, source.keep, sampled)
            rows, left_out = rows + kept, left_out + others
            advance(len(prompts))
        if source.keep != "all" or rejects.is_dir():
            write_left_out(rejects, _shard_name(number), left_out)
        return {_shard_name(number): write_trajectories(folder / _shard_name(number), rows)}

    return make


def _shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _sample(
    run: Run,
    source: SamplingJob,
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
) -> list[Answered]:
    """Trajectories of some prompts, in order, with the prompts' answers."""
    jobs = [(prompt, sample) for prompt in prompts for sample in range(source.samples_per_prompt)]
    section = "prefixes" if source.author == "teacher" else "rollout"
    with within_memory(
        f"responses of the {source.author}", f"lower {section}.batch_size or {section}.max_tokens"
    ):
        generations = engine.generate(
            [written_after(run, prompt, source.author) for prompt, _ in jobs],
            Sampling(source.temperature, source.top_p),
            seeds=[
                derive_seed(run.config.run.seed, source.stage, prompt.id, sample) for prompt, sample in jobs
            ],
            max_tokens=[source.max_tokens] * len(jobs),
        )
    return [
        (to_trajectory(prompt, sample, generation, tokenizer, source.author), prompt.prompt.answer)
        for (prompt, sample), generation in zip(jobs, generations, strict=True)
    ]


def written_after(run: Run, prompt: EncodedPrompt, author: Author) -> Sequence[int]:
    """The token ids after which an author writes: a teacher's context where it is for prefixes too."""
    context = run.config.teacher.context_of(prompt.prompt.domain) if author == "teacher" else None
    return prompt.scored_after if context is not None and context.prefixes else prompt.tokens


def to_trajectory(
    prompt: EncodedPrompt,
    sample: int,
    generation: Generation,
    tokenizer: Any,
    author: Author,
) -> Trajectory:
    """A generation as a row for disk."""
    text = tokenizer.decode(generation.written, skip_special_tokens=True)
    return Trajectory(
        prompt_id=prompt.id,
        sample_index=sample,
        prompt_tokens=prompt.tokens,
        tokens=generation.tokens,
        sampled_logprobs=generation.logprobs,
        finish_reason=generation.finish_reason,
        text=text,
        author=author,
    )


def _finish(stage: Stage, num_prompts: int, samples: int) -> None:
    kept, tokens, covered = 0, 0, set()
    for name in stage.manifest.shards:
        for row in read_trajectories(stage.folder / name):
            kept += 1
            tokens += len(row.tokens)
            covered.add(row.prompt_id)
    if kept == 0:
        raise DataError(
            "the teacher answered no prompt correctly, so prefixes.keep = 'correct' keeps nothing",
            hint='check data.answer_field and evaluation.answer_pattern, or set prefixes.keep = "all"',
        )
    stage.finish(
        prompts=num_prompts,
        prompts_covered=len(covered),
        trajectories=kept,
        kept_fraction=kept / (num_prompts * samples),
        tokens=tokens,
        mean_length=tokens / kept,
    )
