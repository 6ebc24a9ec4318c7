"""What a training step costs on the demo: ``python tests/benchmarks/bench_steps.py``.

Three questions. Ahead: with ``train.max_staleness = 1`` a step should take as long as the longer of its two halves,
preparing (sampling and the teacher's answers) and training. Compiled: what ``runtime.compile`` in trainer and teacher
brings. Scaling: twice the prompts per step should take twice the time, no more. Runs are taken in turns; the models are
the demo's, trained for a moment only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TROPD = Path(sys.executable).with_name("tropd")
WARM, MEASURED, ROUNDS = 8, 20, 3
QUICK = ("demo.teacher_steps=60", "demo.student_steps=60", "demo.spoil_steps=5")


def tropd(*arguments: str | Path) -> None:
    done = subprocess.run([TROPD, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"tropd {arguments[0]} failed:\n{done.stderr[-3000:]}")


@contextmanager
def teacher(folder: Path, compiled: str) -> Iterator[str]:
    """A service for all runs, as warm for the last as for the first."""
    command = [TROPD, "serve-teacher", "-w", folder, "--json", "--set", f"runtime.compile={compiled}"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


def steps(folder: Path, **settings: object) -> list[dict[str, Any]]:
    """The metrics of a run's steps after the warm-up."""
    assignments = {
        "train.steps": WARM + MEASURED,
        "train.checkpoint_every": 1000,
        **settings,
    }
    options = [part for name, value in assignments.items() for part in ("--set", f"{name}={value}")]
    tropd("train", "-w", folder, "--force", *options)
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM:]


def mean(records: list[dict[str, Any]], *names: str) -> float:
    return statistics.fmean(sum(record[name] for name in names) for record in records)


def kinds(folder: Path, url: str, compiled_url: str) -> None:
    plain = {"teacher.url": url}
    compiled = {"teacher.url": compiled_url, "runtime.compile": "true"}
    ahead = {"train.max_staleness": 1}
    runs = {
        "in turns": plain,
        "compiled": compiled,
        "ahead": plain | ahead,
        "ahead, compiled": compiled | ahead,
    }
    rounds = [{name: steps(folder, **settings) for name, settings in runs.items()} for _ in range(ROUNDS)]
    print(f"{MEASURED} steps after {WARM}, {ROUNDS} rounds in turns, medians")
    for name in runs:
        column = [found[name] for found in rounds]
        prepare = statistics.median(mean(r, "time_rollout", "time_score") for r in column)
        train = statistics.median(mean(r, "time_train", "time_optimizer") for r in column)
        total = statistics.median(mean(r, "time_total") for r in column)
        ratios = [mean(found["in turns"], "time_total") / mean(found[name], "time_total") for found in rounds]
        print(
            f"  {name:<16} step {1000 * total:6.1f} ms   (prepare {1000 * prepare:.1f}, train {1000 * train:.1f};"
            f" step / longer half {total / max(prepare, train):.2f})"
            f"   {statistics.median(ratios):.2f} times as fast ({', '.join(f'{r:.2f}' for r in ratios)})"
        )


def scaling(folder: Path, url: str) -> None:
    print("time per trained token at multiples of the demo's 32 prompts per step, in turns, medians")
    found: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    for _ in range(ROUNDS):
        for factor, values in found.items():
            options = {
                "teacher.url": url,
                "rollout.prompts_per_step": 32 * factor,
                "train.steps": WARM + max(4, MEASURED // factor),
            }
            records = steps(folder, **options)
            values.append(sum(r["time_total"] for r in records) / sum(r["tokens_on_policy"] for r in records))
    base = statistics.median(found[1])
    for factor, values in found.items():
        ratios = [value / one for value, one in zip(values, found[1], strict=True)]
        print(
            f"  {factor} x  {1e6 * statistics.median(values):6.1f} µs per token, {statistics.median(values) / base:.2f}"
            f" of 1 x (rounds {', '.join(f'{r:.2f}' for r in ratios)})"
        )


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        tropd("init", folder, "--recipe", "demo")
        quick = [part for assignment in QUICK for part in ("--set", assignment)]
        for stage in ("prepare", "generate-prefixes", "score-teacher"):
            tropd(stage, "-w", folder, *quick)
        with teacher(folder, "false") as url, teacher(folder, "true") as compiled_url:
            kinds(folder, url, compiled_url)
            scaling(folder, url)


if __name__ == "__main__":
    main()
