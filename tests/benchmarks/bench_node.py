"""A step of the paper's table 3 on n GPUs, simulated from phase rates: seconds, occupied share, GPU-hours of the table.

A prediction: `pipeline/training/preflight/rates.toml` says of each rate whether it was measured. Its events are the ends
of rows, rollouts, the teacher's answers and training passes; docs/scale.md has the arithmetic.

    python tests/benchmarks/bench_node.py [--rates FILE] [--gpus 8] [--mean 5500]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tropd.pipeline.config.paper_tables import load_table
from tropd.pipeline.config.recipe_files import load_objective, recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.needs import own_share
from tropd.pipeline.training.preflight.rates import GpuRates, load_rates
from tropd.pipeline.training.preflight.step_time import NodeLayout, StepTime, StepWork, predict

TABLE = load_table("table3", rehearse=False)
SETTING = TABLE.settings[0]
STUDENT = ModelShape(**SETTING.student_sizes.model_dump())
TEACHER = ModelShape(**SETTING.teacher_sizes.model_dump())
PROMPT, MOST, ROWS, STEPS = 200, 8096, 512, 200


def layouts(gpus: int) -> dict[str, NodeLayout]:
    """Those of tropd, and a colocated pipeline as others have."""
    alone = NodeLayout(trainers=1, student="transformers", servers=0, masks=False)
    colocated = replace(alone, trainers=gpus, student="vllm")
    return {
        "one process": alone,
        f"{gpus - 1} trainers, 1 server": replace(alone, trainers=gpus - 1, servers=1),
        "vLLM students, one teacher": replace(colocated, everywhere=False),
        "vLLM students, teacher everywhere": colocated,
        "the same, attention with masks": replace(colocated, masks=True),
        "reference, colocated": replace(colocated, micro_batch_tokens=32_768, is_reference=True),
    }


def spread_lengths(mean: int) -> tuple[int, ...]:
    """Lengths between the longest and as much below the mean as that is above it, evenly."""
    low = 2 * mean - MOST
    return tuple(round(low + (MOST - low) * (i * 173 % ROWS) / (ROWS - 1)) for i in range(ROWS))


def step(layout: NodeLayout, rates: GpuRates, *, mean: int = MOST, own: float = 1.0) -> StepTime:
    """A step of a row whose students write this share of their responses."""
    return predict(layout, StepWork(PROMPT, spread_lengths(mean), own), STUDENT, TEACHER, rates)


def row_config(objective: str) -> Config:
    config = parse_config(recipe_text(SETTING.recipe)).config
    return config.model_copy(update={"objective": load_objective(objective, {})})


def table_hours(layout: NodeLayout, rates: GpuRates, gpus: int) -> float:
    """GPU-hours of training all rows of all settings; a GPU that a layout leaves idle is paid for."""
    owns = [own_share(row_config(row.objective)) for setting in TABLE.settings for row in setting.rows]
    return sum(step(layout, rates, own=own).gpu_hours(STEPS, gpus) for own in owns)


def lines(rates: GpuRates, gpus: int, mean: int) -> list[str]:
    """The table, in Markdown."""
    columns = (
        "OPD row, s",
        "rollout",
        "teacher",
        "train",
        "rest",
        "**step**",
        f"step, mean {mean:,}",
        "step, TrOPD row",
    )
    columns = (*columns, "occupied", "GPU-hours a row", "of table 3")
    found = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    own = own_share(row_config("tropd"))
    for name, layout in layouts(gpus).items():
        full = step(layout, rates)
        phases = (full.rollout, full.teacher, full.train, full.rest)
        seconds = (step(layout, rates, mean=mean).total, step(layout, rates, own=own).total)
        cells = [
            name,
            *(f"{value:,.0f}" for value in phases),
            f"**{full.total:,.0f}**",
            *(f"{value:,.0f}" for value in seconds),
            f"{full.busy * layout.gpus / gpus:.0%}",
            f"{full.gpu_hours(STEPS, gpus):,.0f}",
            f"{table_hours(layout, rates, gpus):,.0f}",
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=Path, help="a TOML file of rates; the packaged ones are of an H100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--mean", type=int, default=5500, help="tokens of a response in the second case")
    chosen = parser.parse_args(arguments)
    rates = load_rates(chosen.rates)
    print("\n".join(lines(rates, chosen.gpus, chosen.mean)))
    measured = [name for name in GpuRates.model_fields if getattr(rates, name).measured]
    print(f"\nmeasured rates: {', '.join(measured)}; all others are assumed")


if __name__ == "__main__":
    main()
