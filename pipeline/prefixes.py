"""Stage 1, ``generate-prefixes``: trajectories of the teacher, from whose beginnings the student continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd.pipeline.context import (
    Run,
    check_pair,
    data_fields,
    load_role,
    model_fields,
    role_tokenizer,
    section_fields,
    training_prompts,
)
from tropd.pipeline.engines.base import Engine, Generation, Sampling
from tropd.pipeline.evaluation.grading import is_correct
from tropd.pipeline.prompts import Prompt
from tropd.storage.errors import DataError
from tropd.storage.fingerprint import Fingerprint
from tropd.storage.manifest import Manifest
from tropd.storage.seeds import derive_seed
from tropd.storage.stage import Stage, open_stage
from tropd.storage.trajectories import Author, Trajectory, read_trajectories, write_trajectories

STAGE = "prefixes"
# Rows handed to the engine at once, in batches: between two calls progress is shown.
BATCHES_PER_CALL = 4


def fingerprint(run: Run) -> Fingerprint:
    """Everything that decides which trajectories are made."""
    config = run.config
    fields = data_fields(run, "prompts") | model_fields(run, "teacher")
    fields |= section_fields("prefixes", config.prefixes, without={"batch_size", "max_tokens"})
    fields |= {"run.seed": config.run.seed, "prefixes.max_tokens": config.prefix_max_tokens}
    if config.prefixes.keep == "correct":
        fields["evaluation.answer_pattern"] = config.evaluation.answer_pattern
    return Fingerprint(fields)


def generate_prefixes(run: Run, *, force: bool = False) -> Manifest:
    """Generate what is missing and return the finished manifest.

    Raises:
        ConfigError, DataError: the inputs do not fit; raised before the teacher is loaded where possible.
        DataError: ``keep = "correct"`` left no trajectory at all.
    """
    config = run.config
    check_pair(run)
    folder = run.workspace.stage(STAGE)
    with open_stage(folder, STAGE, fingerprint(run), force=force, timings=run.timings) as stage:
        if stage.complete:
            run.reporter.info(f"prefixes: done before ({stage.manifest.rows} trajectories), nothing to do")
            return stage.manifest
        tokenizer = role_tokenizer(run, "teacher")
        teacher = load_role(run, "teacher")
        engine = teacher.engine(batch_size=config.prefixes.batch_size)
        prompts, encoded = training_prompts(run, tokenizer, engine.max_length)
        size = config.prefixes.shard_prompts
        starts = list(range(0, len(prompts), size))
        names = [f"part-{number:05d}.parquet" for number in range(len(starts))]
        done = sum(min(size, len(prompts) - s) for s, n in zip(starts, names, strict=True) if stage.has(n))
        with run.reporter.task("teacher prefixes", len(prompts), done=done, unit="prompts") as task:
            for name, start in zip(names, starts, strict=True):
                if stage.has(name):
                    continue
                rows: list[Trajectory] = []
                step = max(
                    1, BATCHES_PER_CALL * config.prefixes.batch_size // config.prefixes.samples_per_prompt
                )
                stop = min(start + size, len(prompts))
                for low in range(start, stop, step):
                    high = min(low + step, stop)
                    rows += _sample(run, engine, tokenizer, prompts[low:high], encoded[low:high])
                    task.advance(high - low)
                stage.commit(name, write_trajectories(folder / name, rows))
        _finish(stage, len(prompts), config.prefixes.samples_per_prompt)
        return stage.manifest


def _sample(
    run: Run, engine: Engine, tokenizer: Any, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]
) -> list[Trajectory]:
    """Trajectories of some prompts, in order, those with wrong answers left out if so configured."""
    config = run.config
    jobs = [
        (prompt, tokens, sample)
        for prompt, tokens in zip(prompts, encoded, strict=True)
        for sample in range(config.prefixes.samples_per_prompt)
    ]
    generations = engine.generate(
        [tokens for _, tokens, _ in jobs],
        Sampling(config.prefixes.temperature, config.prefixes.top_p),
        seeds=[derive_seed(config.run.seed, STAGE, prompt.id, sample) for prompt, _, sample in jobs],
        max_tokens=[config.prefix_max_tokens] * len(jobs),
    )
    rows = []
    for (prompt, tokens, sample), generation in zip(jobs, generations, strict=True):
        row = to_trajectory(prompt, tokens, sample, generation, tokenizer, "teacher")
        if config.prefixes.keep == "all" or is_correct(
            row.text, prompt.answer, config.evaluation.answer_pattern
        ):
            rows.append(row)
    return rows


def to_trajectory(
    prompt: Prompt,
    prompt_tokens: Sequence[int],
    sample: int,
    generation: Generation,
    tokenizer: Any,
    author: Author,
) -> Trajectory:
    """A generation as a row for disk."""
    text = tokenizer.decode(generation.tokens, skip_special_tokens=True)
    return Trajectory(
        prompt_id=prompt.id,
        sample_index=sample,
        prompt_tokens=prompt_tokens,
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
