"""Distances over all held-out prompts, with intervals, per model, for the summary of ``eval``.

Reverse and forward KL, acceptance and entropy are means over tokens, the length over responses; prompts are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tropd.pipeline.stages.evaluation.held_out import responses_file
from tropd.pipeline.stages.evaluation.measuring import distance_file
from tropd.pipeline.stages.evaluation.statistics import token_mean

DistanceRow = dict[str, Any]
Interval = dict[str, float | None]
_NOTHING = {"reverse_kl": None, "forward_kl": None, "acceptance": None}


def summarize_distance(folder: Path, whom: Sequence[str], seed: int) -> dict[str, Any]:
    """By model; of those without such files, nothing. The teacher has no distance to itself: its length and entropy.

    Args:
        folder: of the stage.
        seed: of resampling.
    """
    rows = {who: _read(folder / distance_file(who)) for who in whom if who != "teacher"}
    found = {who: _of_student(own, seed) for who, own in rows.items() if own}
    if "teacher" in whom and (responses := _read(folder / responses_file("teacher"))):
        found["teacher"] = _of_teacher(responses, next((own for own in rows.values() if own), []), seed)
    return found


def _read(path: Path) -> list[DistanceRow]:
    rows: list[DistanceRow] = pq.read_table(path).to_pylist() if path.exists() else []
    return rows


def _of_student(rows: list[DistanceRow], seed: int) -> dict[str, Any]:
    exact = all(row["method"] == "exact" for row in rows)
    lowest = 0.0 if exact else -math.inf  # a mean of K1, which may be negative
    return {
        "reverse_kl": _over_tokens(rows, "student", "reverse_kl", (lowest, math.inf), seed),
        "forward_kl": _over_tokens(rows, "teacher", "forward_kl", (0.0, math.inf), seed),
        "acceptance": _over_tokens(rows, "student", "acceptance", (0.0, 1.0), seed),
        "length": _over_responses([row["student_tokens"] for row in rows], math.inf, seed),
        "truncated": _over_responses([row["student_finish_reason"] == "length" for row in rows], 1.0, seed),
        "entropy": _over_tokens(rows, "student", "student_entropy", (0.0, math.inf), seed),
        "prompts": len(rows),
        "method": "exact" if exact else "topk",
    }


def _of_teacher(responses: list[DistanceRow], rows: list[DistanceRow], seed: int) -> dict[str, Any]:
    return {
        **_NOTHING,
        "length": _over_responses([len(row["tokens"]) for row in responses], math.inf, seed),
        "truncated": _over_responses([row["finish_reason"] == "length" for row in responses], 1.0, seed),
        "entropy": _over_tokens(rows, "teacher", "teacher_entropy", (0.0, math.inf), seed),
        "prompts": len(responses),
        "method": "exact" if all(row["method"] == "exact" for row in rows) else "topk",
    }


def _over_tokens(
    rows: list[DistanceRow], author: str, name: str, bounds: tuple[float, float], seed: int
) -> Interval | None:
    known = [(row[name], row[f"{author}_tokens"]) for row in rows if row[name] is not None]
    if not known:
        return None
    tokens = [count for _, count in known]
    return _interval([mean * count for mean, count in known], tokens, bounds, seed)


def _over_responses(values: Sequence[float], most: float, seed: int) -> Interval | None:
    return _interval(values, [1] * len(values), (0.0, most), seed) if values else None


def _interval(
    sums: Sequence[float], tokens: Sequence[float], bounds: tuple[float, float], seed: int
) -> Interval:
    found = token_mean(sums, tokens, bounds=bounds, seed=seed)
    ends = {"mean": found.value, "low": found.low, "high": found.high}
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}
