"""Responses to evaluation problems, piece by piece: made here, as the part of a job, or on several GPUs.

A piece is ``part-<who>-00000.parquet`` (of a benchmark in its folder) and depends on the run and on its own number only.
Jobs have folders of their own, from which the stage gathers them (see ``storage.stage.job_parts``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.models.engines.base import Sampler
from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt
from tropd.pipeline.problems.grading.grading import check_expected
from tropd.pipeline.run.processes.gpus import run_parts
from tropd.pipeline.run.processes.together import tropd_command
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.responses import SCHEMA, Response, respond
from tropd.pipeline.stages.shards import Part
from tropd.pipeline.teacher.by_domain import batched
from tropd.storage.disk.atomic import atomic_file
from tropd.storage.formats.trajectories import Trajectory
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.job_parts import gather, made_shards, part_folder
from tropd.storage.stage.manifest import Manifest
from tropd.storage.stage.stage import Stage, open_stage
from tropd.storage.workspace import Mode

_PIECE = re.compile(r"part-[a-z]+-\d{5}\.parquet$")
Problems = Mapping[tuple[str, str], Encoded]
"""Problems by the name of their set and the role whose tokenizer encodes them."""


@dataclass(frozen=True)
class Piece:
    """Problems whose responses are sampled and committed together."""

    name: str
    """Of its file, in the stage's folder."""
    of: str
    """Name of the set of problems; empty for ``[evaluation]``."""
    mode: Mode
    samples: int
    problems: Sequence[EncodedPrompt]

    @property
    def size(self) -> int:
        """Number of responses."""
        return len(self.problems) * self.samples


def part_file(name: str, who: str) -> str:
    """Name of the file of a model's responses to a set of problems."""
    return f"{name}/part-{who}.parquet" if name else f"part-{who}.parquet"


def pieces_of(run: Run, who: str, name: str, problems: Problems) -> list[Piece]:
    """The pieces of a model's responses to a set of problems, in their order.

    Raises:
        DataError: an expected answer that no response could ever equal.
    """
    settings = run.config.evaluation_sets[name]
    prompts = problems[name, "teacher" if who == "teacher" else "student"].prompts
    check_expected(settings.grader, [one.prompt for one in prompts])
    modes: list[tuple[Mode, int]] = [("sampled", settings.samples)]
    if not name:
        modes.insert(0, ("greedy", 1))
    graded = [one for one in prompts if one.prompt.answer is not None]
    batches = [
        (mode, samples, some)
        for mode, samples in modes
        for some in batched(graded, max(1, settings.batch_size // samples))
    ]
    stem = part_file(name, who).removesuffix(".parquet")
    return [
        Piece(f"{stem}-{number:05d}.parquet", name, mode, samples, some)
        for number, (mode, samples, some) in enumerate(batches)
    ]


def make_piece(
    run: Run,
    stage: Stage,
    who: str,
    piece: Piece,
    engine: Sampler,
    tokenizer: Any,
    known: Mapping[str, Trajectory] = {},
) -> None:
    """Write a piece and commit it."""
    settings = run.config.evaluation_sets[piece.of]
    responses = respond(run, settings, engine, tokenizer, piece.problems, piece.mode, piece.samples, known)
    _write_table(stage.folder / piece.name, _as_table(who, responses))
    stage.commit(piece.name, rows=len(responses))


def join_pieces(
    stage: Stage, who: str, name: str, pieces: Sequence[Piece], judge: Callable[[pa.Table], pa.Table]
) -> None:
    """Write all pieces of a set of problems as one file and commit it.

    Args:
        judge: gives the responses the marks that they lack, if any.
    """
    part = part_file(name, who)
    tables = [pq.read_table(stage.folder / piece.name) for piece in pieces] or [SCHEMA.empty_table()]
    responses = judge(pa.concat_tables(tables))
    _write_table(stage.folder / part, responses)
    stage.commit(part, rows=responses.num_rows)


def drop_pieces(stage: Stage) -> None:
    """Delete the pieces, which are in their parts by now, and the rest that a killed stage has left."""
    for piece in [name for name in stage.manifest.shards if _PIECE.search(name)]:
        stage.retire(piece)
    for path in stage.folder.rglob("*.parquet"):
        if _PIECE.search(path.name):
            path.unlink()


def make_part(
    run: Run,
    name: str,
    fingerprint: Fingerprint,
    whom: Sequence[str],
    problems: Problems,
    part: Part,
    open_model: Callable[[str], tuple[Sampler, Any]],
) -> Manifest:
    """A job's share of the missing pieces, in a folder of its own; returns the manifest of that."""
    folder = run.workspace.stage(name)
    own = part_folder(folder, part.index, part.count)
    elsewhere = made_shards(folder, fingerprint.digest, but=own)
    with open_stage(own, name, Fingerprint(fingerprint.fields), timings=run.timings) as stage:
        number = 0
        for who in whom:
            mine = []
            for of in run.config.evaluation_sets:
                for piece in pieces_of(run, who, of, problems):
                    number += 1
                    made = stage.has(piece.name) or not elsewhere.isdisjoint((piece.name, part_file(of, who)))
                    if number % part.count == part.index % part.count and not made:
                        mine.append(piece)
            if mine:
                engine, tokenizer = open_model(who)
                with run.reporter.task(
                    f"evaluate {who}", sum(p.size for p in mine), unit="responses"
                ) as task:
                    for piece in mine:
                        make_piece(run, stage, who, piece, engine, tokenizer)
                        task.advance(piece.size)
                del engine
        return stage.manifest


def make_on_gpus(run: Run, stage: Stage, whom: Sequence[str], problems: Problems, gpus: int) -> None:
    """Make the missing pieces in a process per GPU, or per group of GPUs that an engine needs, and gather them."""
    pieces = [
        piece
        for who in whom
        for of in run.config.evaluation_sets
        if not stage.has(part_file(of, who))
        for piece in pieces_of(run, who, of, problems)
    ]
    each = run.config.vllm.tensor_parallel_size if "vllm" in _engines(run, whom) else 1
    parts = min(gpus // each, len(pieces))
    gather(stage, [[piece.name] for piece in pieces])
    if parts < 2 or all(stage.has(piece.name) for piece in pieces):
        return
    stage.shared = True
    command = tropd_command("evaluate", run.workspace.root, run.assignments, "--who", ",".join(whom))
    logs = run.workspace.logs
    with run.reporter.waiting(f"evaluate: {parts} processes; their logs are in {logs}"):
        run_parts(command, parts, logs, "evaluate", devices_each=each)
    gather(stage, [[piece.name] for piece in pieces])


def _engines(run: Run, whom: Sequence[str]) -> set[str]:
    return {getattr(run.config, "teacher" if who == "teacher" else "student").engine for who in whom}


def _as_table(who: str, responses: Sequence[Response]) -> pa.Table:
    rows = [{"who": who, **vars(response)} for response in responses]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
