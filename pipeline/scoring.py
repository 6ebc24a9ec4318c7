"""Stage 2, ``score-teacher``: the teacher's top-k log-probs of stored trajectories, into the cache.

Trajectories are the teacher's (``prefixes`` into ``scores``) or stored student rollouts (``rollouts`` into
``rollout-scores``). For each trajectory shard ``part-N.parquet`` two outputs: ``part-N.zarr``, the ragged top-k
cache, and ``part-N.parquet``, which names the trajectory of each of its rows and holds the sampled log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.context import Run, finished, load_role, model_fields, section_fields
from tropd.pipeline.engines.base import Engine, SequenceScores
from tropd.storage.atomic import atomic_file
from tropd.storage.errors import TropdError
from tropd.storage.fingerprint import Fingerprint
from tropd.storage.manifest import Manifest
from tropd.storage.stage import Stage, open_stage
from tropd.storage.topk_cache import TopK, concatenate, prune, read_topk, write_topk
from tropd.storage.trajectories import Trajectory, iter_stage

STAGES = {"prefixes": "scores", "rollouts": "rollout-scores"}
COMMANDS = {"prefixes": "generate-prefixes", "rollouts": "generate-rollouts"}
# Rows scored between two updates of the progress bar.
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
    """Everything that decides the scores: the trajectories, the teacher, and what is kept."""
    fields = model_fields(run, "teacher") | {f"upstream.{source.stage}": source.fingerprint}
    fields |= section_fields("scores", run.config.scores, without={"batch_tokens"})
    return Fingerprint(fields)


def score_teacher(run: Run, *, source_stage: str = "prefixes", force: bool = False) -> Manifest:
    """Score what is missing of the trajectories in ``source_stage`` and return the finished manifest.

    Raises:
        TropdError: the trajectories are not finished, or the teacher gives NaN.
    """
    source_folder = run.workspace.stage(source_stage)
    source = finished(run, source_stage, COMMANDS[source_stage])
    name_of_stage = STAGES[source_stage]
    folder = run.workspace.stage(name_of_stage)
    with open_stage(
        folder, name_of_stage, fingerprint(run, source), force=force, timings=run.timings
    ) as stage:
        if stage.complete:
            run.reporter.info(
                f"scores: done before ({stage.manifest.summary['tokens']} tokens), nothing to do"
            )
            return stage.manifest
        engine = load_role(run, "teacher").engine(batch_size=1, batch_tokens=run.config.scores.batch_tokens)
        done = sum(source.shards[n].rows for n in source.shards if _is_done(stage, n))
        with run.reporter.task("teacher scores", source.rows, done=done, unit="trajectories") as task:
            for name, rows in iter_stage(source_folder, source):
                if _is_done(stage, name):
                    continue
                parts = []
                for low in range(0, len(rows), ROWS_PER_CALL):
                    batch = rows[low : low + ROWS_PER_CALL]
                    parts.append(_score(engine, batch, run.config.scores.k, run.config.scores.mass))
                    task.advance(len(batch))
                data = concatenate(parts)
                cache_name = f"{Path(name).stem}.zarr"
                write_topk(folder / cache_name, data)
                stage.commit(cache_name, rows=len(rows))
                _write_rows(folder / name, rows, data)
                stage.commit(name, rows=len(rows))
        _finish(stage)
        return stage.manifest


def _is_done(stage: Stage, name: str) -> bool:
    return stage.has(name) and stage.has(f"{Path(name).stem}.zarr")


def _score(engine: Engine, rows: Sequence[Trajectory], k: int, mass: float) -> TopK:
    scores = engine.score(
        [[*row.prompt_tokens, *row.tokens] for row in rows], [len(row.prompt_tokens) for row in rows], k=k
    )
    for row, scored in zip(rows, scores, strict=True):
        _check(row, scored)
    return prune(
        np.concatenate([s.topk_ids for s in scores]),
        np.concatenate([s.topk_logprobs for s in scores]),
        np.concatenate([s.sampled for s in scores]),
        [len(row.tokens) for row in rows],
        mass=mass,
    )


def _check(row: Trajectory, scored: SequenceScores) -> None:
    for values in (scored.sampled, scored.topk_logprobs):
        if np.isnan(values).any() or (values > 1e-3).any():
            raise TropdError(
                f"the teacher gives NaN or positive log-probs for prompt {row.prompt_id!r}, "
                f"sample {row.sample_index}",
                hint='try teacher.dtype = "float32"; nothing was written for this shard',
            )


def _write_rows(path: Path, rows: Sequence[Trajectory], data: TopK) -> None:
    offsets = pa.array(data.offsets.astype(np.int32))
    table = pa.table(
        [
            pa.array([row.prompt_id for row in rows], pa.string()),
            pa.array([row.sample_index for row in rows], pa.int32()),
            pa.ListArray.from_arrays(offsets, pa.array(data.sampled)),
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
