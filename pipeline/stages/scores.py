"""Stage 2, ``score-teacher``: the teacher's top-k log-probs of stored trajectories, into the cache.

Trajectories are the teacher's (``prefixes`` into ``scores``) or stored student rollouts (``rollouts`` into
``rollout-scores``). For each trajectory shard ``part-N.parquet`` two outputs: ``part-N.zarr``, the ragged top-k
cache, and ``part-N.parquet``, which names the trajectory of each of its rows and holds the sampled log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.config.sections.value_types import MOST_ALTERNATIVES
from tropd.pipeline.models.engines.base import Engine, SequenceScores
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.run.identity import engine_fields, fingerprint_of, model_fields, section_fields
from tropd.pipeline.run.opening import role_num_tokens
from tropd.pipeline.run.run import Run, as_scorer
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.stages.kept_mass import LOW, kept_mass, low_mass_warning, needed_alternatives
from tropd.pipeline.stages.shard_work import Maker, ShardSpec, Work
from tropd.pipeline.stages.shards import HERE, Execution, run_stage
from tropd.pipeline.teacher.by_domain import (
    GENERAL,
    EngineSlot,
    fields_of_all,
    prompt_teachers,
    teachers_in_use,
)
from tropd.pipeline.teacher.reading import context_fields, scored_prompts
from tropd.storage.bounds import are_logprobs
from tropd.storage.cache.shard import TopK, concatenate, prune, read_topk, write_topk
from tropd.storage.disk.atomic import atomic_file
from tropd.storage.errors import DataError, TropdError
from tropd.storage.formats.trajectories import Trajectory, read_trajectories
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import Manifest, check_shard
from tropd.storage.stage.stage import Stage
from tropd.storage.workspace import scores_stage, stage_kind

# Rows scored together: between two calls progress is shown. It decides how rows are padded, so it is fixed.
ROWS_PER_CALL = 256

ROWS_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("sampled_logprobs", pa.list_(pa.float32()), nullable=False),
    ],
    metadata={b"tropd.schema": b"score-rows", b"tropd.schema_version": b"1"},
)


def fingerprint(run: Run, source: Manifest) -> Fingerprint:
    """Everything that decides the scores: the trajectories, the teacher, and the kept alternatives."""

    def of(run: Run) -> dict[str, Scalar]:
        fields = model_fields(run, "teacher") | engine_fields(as_scorer(run), "teacher")
        return fields | {"teacher.vocab_size": role_num_tokens(run, "teacher")}

    fields = fields_of_all(run, teachers_in_use(run), of) | {f"upstream.{source.stage}": source.fingerprint}
    if run.config.teacher.contexts:
        fields |= context_fields(run, scored_prompts(run, source.stage).prompts)
    fields |= section_fields("scores", run.config.scores)
    return fingerprint_of(run, fields)


def score_teacher(
    run: Run, *, source_stage: str = "prefixes", execution: Execution = HERE, force: bool = False
) -> Manifest:
    """Score the trajectories of ``source_stage`` that have no scores yet; returns the manifest (see ``run_stage``).

    Raises:
        ConfigError: no stage of that name has trajectories.
        TropdError: the trajectories are not finished, or the teacher gives NaN.
    """
    stage = scores_stage(source_stage)
    source = finished(run, source_stage)

    def plan() -> Work:
        shards = [
            ShardSpec(number, (_cache_name(shard.name), shard.name), shard.rows)
            for number, shard in enumerate(source.shards.values())
        ]
        return Work("teacher scores", "trajectories", shards, partial(open_scorer, source_stage))

    return run_stage(
        run,
        stage,
        fingerprint(run, source),
        plan,
        _finish,
        execution=execution,
        force=force,
    )


def open_scorer(source_stage: str, run: Run) -> Maker:
    """Load the teacher; return a maker that scores one shard of trajectories after another."""
    source_folder = run.workspace.stage(source_stage)
    source = finished(run, source_stage)
    shards = list(source.shards.values())
    config = run.config.scores
    teachers = EngineSlot(run, "teacher", batch_tokens=config.batch_tokens)
    teacher_of = prompt_teachers(run) if run.config.teacher.by_domain else {}
    told = (
        {one.id: one for one in scored_prompts(run, source_stage).prompts}
        if run.config.teacher.contexts
        else {}
    )

    def make(number: int, folder: Path, advance: Callable[[int], None]) -> dict[str, int]:
        shard = shards[number]
        check_shard(source_folder, shard)
        keys, parts = [], []
        trajectories = read_trajectories(source_folder / shard.name)
        while rows := list(islice(trajectories, ROWS_PER_CALL)):
            names = {teacher_of.get(row.prompt_id, GENERAL) for row in rows}
            if len(names) > 1:
                raise TropdError(
                    f"{shard.name} of {source_stage} holds prompts of several teachers: it was made before "
                    "teacher.by_domain was set as it is now",
                    hint=f"{run.command(stage_kind(source_stage).command)} --force",
                )
            engine, _ = teachers.open(*names, to_score=True)
            largest = max((token for row in rows for token in row.tokens), default=-1)
            check_token_ids(run, largest, engine.vocab_size, stage_kind(source_stage).command)
            keys += [(row.prompt_id, row.sample_index) for row in rows]
            parts.append(_score(engine, [_as_told(run, row, told) for row in rows], config.k, config.mass))
            advance(len(rows))
        data = concatenate(parts)
        if number == 0:
            first = islice(read_trajectories(source_folder / shard.name), ROWS_PER_CALL)
            _tell_low_mass(run, engine, [_as_told(run, row, told) for row in first], data)
        write_topk(folder / _cache_name(shard.name), data, precision=config.precision)
        _write_rows(folder / shard.name, keys, data)
        return {_cache_name(shard.name): len(keys), shard.name: len(keys)}

    return make


def _as_told(run: Run, row: Trajectory, told: Mapping[str, EncodedPrompt]) -> Trajectory:
    """A trajectory after its prompt as the teacher reads it; as it is, where no teacher has a context of its own.

    Raises:
        DataError: its prompt is not among the training prompts any more.
    """
    if not told:
        return row
    prompt = told.get(row.prompt_id)
    if prompt is None or list(prompt.tokens) != list(row.prompt_tokens):
        raise DataError(
            f"the trajectories stored for prompt {row.prompt_id!r} answer another text than data.prompts now has, "
            "so teacher.context does not fit them",
            hint="make them again: tropd generate-prefixes (or generate-rollouts) --force",
        )
    return replace(row, prompt_tokens=prompt.scored_after)


def _tell_low_mass(run: Run, engine: Engine, rows: Sequence[Trajectory], data: TopK) -> None:
    """Warn where a shard's alternatives hold little of the probability, with the k that would hold more."""
    kept, config = kept_mass(data), run.config.scores
    if kept >= LOW or config.k >= engine.vocab_size or run.config.teacher.scorer != "transformers":
        return
    with within_memory("the teacher's whole distribution at some tokens", "lower scores.batch_tokens"):
        needed = needed_alternatives(engine, rows)
    run.reporter.warning(low_mass_warning(kept, config.k, needed, MOST_ALTERNATIVES))


def check_token_ids(run: Run, largest: int, num_tokens: int, command: str) -> None:
    """Refuse stored trajectories with ids that the tokenizer does not have.

    Args:
        largest: of all their ids.
        command: makes them.

    Raises:
        DataError: naming the id and the command.
    """
    if largest >= num_tokens:
        raise DataError(
            f"stored trajectories hold token id {largest}, and the tokenizer has ids 0 … {num_tokens - 1}: earlier "
            "versions sampled rows of the output layer that are no tokens",
            hint=f"make them again: tropd {command} -w {run.workspace.root} --force",
        )


def _cache_name(shard_name: str) -> str:
    return f"{Path(shard_name).stem}.zarr"


def _score(engine: Engine, rows: Sequence[Trajectory], k: int, mass: float) -> TopK:
    with within_memory("the teacher's scores of stored trajectories", "lower scores.batch_tokens"):
        scores = engine.score(
            [[*row.prompt_tokens, *row.tokens] for row in rows], [len(row.prompt_tokens) for row in rows], k=k
        )
    for row, scored in zip(rows, scores, strict=True):
        _check(row, scored)
    return prune(
        np.concatenate([s.topk_ids for s in scores]),
        np.concatenate([s.topk_logprobs for s in scores]),
        np.concatenate([s.token_logprobs for s in scores]),
        [len(row.tokens) for row in rows],
        mass=mass,
    )


def _check(row: Trajectory, scored: SequenceScores) -> None:
    for values in (scored.token_logprobs, scored.topk_logprobs):
        if not are_logprobs(values):
            raise TropdError(
                f"the teacher gives NaN or positive log-probs for prompt {row.prompt_id!r}, "
                f"sample {row.sample_index}",
                hint='try teacher.dtype = "float32"; nothing was written for this shard',
            )


def _write_rows(path: Path, keys: Sequence[tuple[str, int]], data: TopK) -> None:
    offsets = pa.array(data.offsets.astype(np.int32))
    table = pa.table(
        [
            pa.array([prompt_id for prompt_id, _ in keys], pa.string()),
            pa.array([sample for _, sample in keys], pa.int32()),
            pa.ListArray.from_arrays(offsets, pa.array(data.teacher_logprobs)),
        ],
        schema=ROWS_SCHEMA,
    )
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=3)


def _finish(stage: Stage) -> None:
    tokens, alternatives, kept = 0, 0, 0.0
    for name in stage.manifest.shards:
        if name.endswith(".zarr"):
            data = read_topk(stage.folder / name)
            tokens += data.num_tokens
            alternatives += len(data.ids)
            kept += float(np.exp(data.logprobs.astype(np.float64)).sum())
    size = sum(s.size for s in stage.manifest.shards.values() if s.name.endswith(".zarr"))
    per_token = max(tokens, 1)
    stage.finish(
        tokens=tokens,
        bytes_per_token=size / per_token,
        alternatives_per_token=alternatives / per_token,
        kept_mass=kept / per_token,
    )
