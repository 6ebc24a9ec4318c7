"""Memory of scoring 100,000 trajectories: ``python tests/benchmarks/bench_memory.py [TRAJECTORIES]``.

The rows are tiny and the teacher is one random layer: what is measured is whether anything grows with the number of
trajectories. Prints the resident memory after the first shards, at tenths of the way, and the growth in between.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from tiny_runs import make_models, make_run

from tropd.pipeline.run.progress import SILENT, Task
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages import prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.storage.formats.trajectories import Trajectory, write_trajectories
from tropd.storage.stage.stage import open_stage

SHARD_ROWS = 1024
TOKENS = 12


class MemoryReporter:
    """Notes the resident memory as trajectories are scored."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    @contextmanager
    def task(self, description: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        reporter = self

        class Noting:
            progress = done

            def advance(self, amount: float = 1, **values: object) -> None:
                self.progress += amount
                reporter.seen.append((self.progress, psutil.Process().memory_info().rss / 1e6))

        yield Noting()

    info = warning = SILENT.info


def write_stage(run: Run, count: int) -> None:
    """What ``tropd generate-prefixes`` would have written."""
    folder = run.workspace.stage("prefixes")
    with open_stage(folder, "prefixes", prefixes.fingerprint(run, prefixes.teacher_source(run))) as stage:
        for number, start in enumerate(range(0, count, SHARD_ROWS)):
            rows = [
                Trajectory(
                    prompt_id=f"p{i}",
                    sample_index=0,
                    prompt_tokens=[3, 4, 5],
                    tokens=[3 + (i + j) % 20 for j in range(TOKENS)],
                    sampled_logprobs=[-1.0] * TOKENS,
                    finish_reason="length",
                    text="",
                    author="teacher",
                )
                for i in range(start, min(start + SHARD_ROWS, count))
            ]
            name = f"part-{number:05d}.parquet"
            stage.commit(name, write_trajectories(folder / name, rows))
        stage.finish(trajectories=count)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(Path(scratch) / "run", make_models(Path(scratch) / "models"))
        write_stage(run, count)
        reporter = MemoryReporter()
        manifest = score_teacher(replace(run, reporter=reporter))
    print(f"{manifest.summary['tokens']:,} tokens of {count:,} trajectories in {len(manifest.shards)} shards")
    _, first = next(entry for entry in reporter.seen if entry[0] >= SHARD_ROWS)
    for tenth in range(11):
        scored, rss = min(reporter.seen, key=lambda entry: abs(entry[0] - tenth * count / 10))
        print(f"{scored:>9,.0f} trajectories: {rss:7.1f} MB resident")
    print(f"growth from the first shard to the last: {reporter.seen[-1][1] - first:.1f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
