"""The phases of a training step: seconds, tokens per second, memory, and the share of the time that GPUs idle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tropd.pipeline.report.data.facts import TrainingPhase

PHASE_TOKENS = {
    "rollout": ("tokens_on_policy",),
    "score": ("teacher_tokens_scored",),
    "train": ("tokens_on_policy", "tokens_guidance"),
}
"""Metrics that count the tokens of a phase, by the name that it has in ``time_…`` and ``memory_peak_…``."""

AT_WORK = {"score": "time_ask"}
"""The metric of a phase's seconds of work, where it is also done beside others and ``time_…`` is the wait for its end."""

EXCHANGES = "exchange_seconds"
"""The metric of the processes' waits, a list."""


def summarize_phases(rows: Sequence[Mapping[str, float]]) -> list[TrainingPhase]:
    """The phases over all steps, those that have been timed."""
    phases = []
    for name, counts in PHASE_TOKENS.items():
        timed = [row for row in rows if f"time_{name}" in row]
        seconds = math.fsum(row[f"time_{name}"] for row in timed)
        if not seconds:
            continue
        work = math.fsum(row.get(AT_WORK.get(name, ""), row[f"time_{name}"]) for row in timed)
        counted = any(count in row for row in timed for count in counts)
        tokens = math.fsum(row.get(count, 0.0) for row in timed for count in counts)
        phases.append(
            TrainingPhase(
                name=name,
                seconds=seconds,
                tokens_per_second=tokens / work if counted and work else None,
                peak_bytes=max((row[p] for row in rows if (p := f"memory_peak_{name}") in row), default=None),
                mfu=_mfu(timed) if name == "train" else None,
            )
        )
    return phases


def by_process(values: Any) -> dict[str, float]:
    """Seconds that each process waited in exchanges, as numbers with names of their own."""
    known = isinstance(values, list) and all(isinstance(one, int | float) for one in values)
    return {f"{EXCHANGES}_{rank}": float(value) for rank, value in enumerate(values)} if known else {}


def idle_shares(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Of each process the share of the steps in which it waited for the others; empty for a single one.

    Steps of another number of processes than the last step's do not count.
    """
    names = _processes(rows[-1]) if rows else []
    same = [row for row in rows if _processes(row) == names and row.get("time_total")]
    if not names or not same:
        return []
    seconds = math.fsum(row["time_total"] for row in same)
    return [math.fsum(row[name] for row in same) / seconds for name in names]


def _processes(row: Mapping[str, float]) -> list[str]:
    return [name for name in row if name.startswith(f"{EXCHANGES}_")]


def _mfu(timed: Sequence[Mapping[str, float]]) -> float | None:
    """Weighted by time, so that it is that of all steps' operations."""
    known = [row for row in timed if "mfu_train" in row]
    seconds = math.fsum(row["time_train"] for row in known)
    return math.fsum(row["mfu_train"] * row["time_train"] for row in known) / seconds if seconds else None
