"""The training metrics: whole lines are read, and added up over the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tropd.pipeline.report.data.facts import RegionFraction, Training
from tropd.pipeline.report.data.phases import EXCHANGES, by_process, idle_shares, summarize_phases
from tropd.storage.formats.step_log import read_log, spans

MetricsRow = dict[str, float]

_SUMMED = (
    "tokens_on_policy",
    "tokens_guidance",
    "teacher_tokens_scored",
    "teacher_topk_tokens",
    "teacher_bytes_received",
    "teacher_bytes_sent",
)
_TIMED = ("rollout", "score", "train", "optimizer", "sync")
# Where the next step is prepared while one trains, only training's wait for it counts.
_TIMED_AHEAD = ("wait", "train", "optimizer", "sync")


def read_metrics(path: Path, trained: int = 0) -> tuple[list[MetricsRow], list[str]]:
    """Numeric fields per step, in step order, and the problems of the file.

    Args:
        trained: steps that must be on record.

    A step that was repeated after an interruption counts once, as it was last. A torn last line is left by
    a kill and is no problem; other unreadable lines are.
    """
    not_finite: dict[str, list[int]] = {}
    try:
        found = read_log(path)
    except OSError as error:
        return [], [f"train: {path.name} cannot be read ({error.strerror})"]
    rows: dict[int, MetricsRow] = {}
    for entry in found.whole:
        step = int(entry["step"])
        row: MetricsRow = {}
        for name, value in entry.items():
            if name == "teacher_retries":
                value = total_of_servers(value)
            if name == EXCHANGES:
                row |= by_process(value)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                row[name] = value
            else:
                not_finite.setdefault(name, []).append(step)
        rows[step] = row
    unreadable = sum(not line.torn for line in found.damaged)
    problems = [f"train: {unreadable} unreadable line(s) in {path.name} are left out"] if unreadable else []
    if found.whole and (missing := found.missing(range(trained))):
        problems.append(f"train: {path.name} has no record of step {spans(missing)}")
    for name, steps in sorted(not_finite.items()):
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        problems.append(f"train: {name} is not a finite number at step {steps[0]}{more}")
    return [rows[step] for step in sorted(rows)], problems


def total_of_servers(counts: Any) -> Any:
    """The sum of counts by server; anything else as it is."""
    whole = isinstance(counts, list) and all(isinstance(one, int) for one in counts)
    return sum(counts) if whole else counts


def summarize_training(
    rows: list[MetricsRow], *, planned_steps: int | None, stage_seconds: float | None
) -> Training | None:
    """Totals and columns, or None if no step is on record."""
    if not rows:
        return None
    names = sorted({name for row in rows for name in row} - {"step"})
    # A line may hold an evaluation only, such as one before the first step.
    steps = [row for row in rows if any(not n.startswith(("step", "accuracy_")) for n in row)]
    sums = {name: _total(steps, name) for name in _SUMMED}
    return Training(
        steps=len(steps),
        planned_steps=planned_steps,
        **{name: None if total is None else round(total) for name, total in sums.items()},
        region_fraction=RegionFraction(
            trust=_token_weighted(steps, "region_fraction_trust"),
            outlier=_token_weighted(steps, "region_fraction_outlier"),
            guidance=_token_weighted(steps, "region_fraction_guidance"),
        ),
        seconds=_seconds(steps, stage_seconds),
        phases=summarize_phases(steps),
        idle_shares=idle_shares(steps),
        queue_seconds=_total(steps, "time_queue"),
        series={name: [row.get(name) for row in rows] for name in ["step", *names]},
    )


def _total(rows: list[MetricsRow], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return math.fsum(values) if values else None


def _token_weighted(rows: list[MetricsRow], name: str) -> float | None:
    """Mean over the run of a share of each step's supervised tokens; equal weights where no step counts them."""
    known = [row for row in rows if name in row]
    if not known:
        return None
    weights = [row.get("tokens_on_policy", 0) + row.get("tokens_guidance", 0) for row in known]
    if not any(weights):
        weights = [1.0] * len(known)
    return math.fsum(w * row[name] for w, row in zip(weights, known, strict=True)) / math.fsum(weights)


def _seconds(rows: list[MetricsRow], stage_seconds: float | None) -> dict[str, float]:
    """Parts of the steps; ``other`` is the stage's time beyond them (start, evaluations, checkpoints)."""
    waited, prepared = (
        _total(rows, "time_wait"),
        sum(_total(rows, f"time_{p}") or 0.0 for p in ("rollout", "score")),
    )
    ahead = waited is not None and waited < 0.9 * prepared
    parts = {part: _total(rows, f"time_{part}") for part in (_TIMED_AHEAD if ahead else _TIMED)}
    seconds = {part: value for part, value in parts.items() if value is not None}
    whole = stage_seconds if stage_seconds is not None else _total(rows, "time_total")
    if whole is not None and seconds:
        seconds["other"] = max(0.0, whole - sum(seconds.values()))
    return seconds
