"""Metrics of a step, and the files they go to (JSONL and TensorBoard), exact across interruptions."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from tropd.pipeline.objectives.loss import floored_log_ratio
from tropd.pipeline.objectives.partition import Regions, acceptance
from tropd.pipeline.training.rollout.rows import Row
from tropd.pipeline.training.update.gradients import StepInputs, StepOutcome
from tropd.storage.disk.aside import set_aside
from tropd.storage.formats.step_log import StepRecord, log_line, resume_log
from tropd.storage.workspace import METRICS

BOARD = "tensorboard"
HISTOGRAM_BINS = 10


def step_metrics(inputs: StepInputs, outcome: StepOutcome) -> StepRecord:
    """All metrics of a step's tokens, as flat numbers; the report explains each."""
    student = inputs.sampler_logprobs.astype(np.float32)
    teacher = inputs.teacher.teacher_logprobs
    # K1 estimates KL(π_S‖π_T) per token: positive where the student is surer of its token than the teacher.
    asked = ~np.isnan(teacher)  # none, where only rewards count
    k1 = -floored_log_ratio(teacher, student)[asked]
    prefix = int(sum(len(row.plan.prefix_tokens) for row in inputs.rows))
    record: StepRecord = {
        "loss": sum(outcome.losses.values()),
        **{f"loss_{name}": value for name, value in outcome.losses.items()},
        **_fractions(inputs.regions, prefix),
        "tokens_on_policy": len(teacher),
        "tokens_guidance": prefix,
        "tokens_supervised": outcome.supervised_tokens,
        **_responses(inputs.rows),
        "k1_mean": _mean(k1),
        "k1_min": float(k1.min()) if len(k1) else None,
        "k1_max": float(k1.max()) if len(k1) else None,
        **_k1_of("trust", k1, inputs.regions.trust[asked]),
        **_k1_of("outlier", k1, inputs.regions.outlier[asked]),
        "student_entropy": _mean(outcome.student_entropy),
        "teacher_entropy": None if inputs.teacher.entropy is None else _mean(inputs.teacher.entropy),
        "topk_overlap": _mean(outcome.overlap[~np.isnan(outcome.overlap)]),
        "topk_student_mass": _mean(outcome.student_topk_mass[~np.isnan(outcome.student_topk_mass)]),
        "topk_teacher_mass": _mean(-np.expm1(np.minimum(inputs.teacher.topk.tail.astype(np.float64), 0.0))),
        **_acceptance(student[asked], teacher[asked]),
        **_importance(inputs, outcome),
        **_rewards(inputs),
    }
    record |= {f"grad_norm_{name}": norm for name, norm in outcome.region_gradient_norms.items()}
    return record


def _fractions(regions: Regions, prefix: int) -> StepRecord:
    trust, outlier = float(regions.trust.sum()), float(regions.outlier.sum())
    tokens = max(len(regions.trust) + prefix, 1)
    return {
        "region_fraction_trust": trust / tokens,
        "region_fraction_outlier": outlier / tokens,
        "region_fraction_guidance": prefix / tokens,
    }


def _responses(rows: Sequence[Row]) -> StepRecord:
    lengths = [len(r.plan.prefix_tokens) + len(r.tokens) for r in rows]
    return {
        "prefix_length_mean": float(np.mean([len(r.plan.prefix_tokens) for r in rows])),
        "response_length_mean": float(np.mean(lengths)),
        "truncated_fraction": float(np.mean([r.truncated for r in rows])),
    }


def _k1_of(region: str, k1: Any, weights: Any) -> StepRecord:
    """Mean and extremes of K1 over a region's tokens; None where it has none."""
    inside = k1[weights > 0]
    return {
        f"k1_{region}": _weighted_mean(k1, weights),
        f"k1_{region}_min": float(inside.min()) if len(inside) else None,
        f"k1_{region}_max": float(inside.max()) if len(inside) else None,
    }


def _acceptance(student: Any, teacher: Any) -> StepRecord:
    probability = acceptance(student, teacher)
    histogram, _ = np.histogram(probability, bins=HISTOGRAM_BINS, range=(0.0, 1.0))
    return {"acceptance_mean": _mean(probability), "acceptance_histogram": histogram.tolist()}


def _importance(inputs: StepInputs, outcome: StepOutcome) -> StepRecord:
    """π_θ/μ of the student's tokens, and how far trainer and sampler are apart on their log-probs at temperature 1.

    Both are 1 and 0 but for rounding unless the sampler is another engine or has older weights; π_θ/μ also differs where
    the sampling is at another temperature or top-p.
    """
    sampler, mu = inputs.sampler_logprobs.astype(np.float32), inputs.mu_logprobs.astype(np.float32)
    difference = outcome.student_logprobs - sampler
    if not len(difference):
        return {"importance_mean": None, "importance_max": None, "sampler_logprob_difference_max": None}
    ratio = np.exp(outcome.student_logprobs - mu)
    return {
        "importance_mean": float(ratio.mean()),
        "importance_max": float(ratio.max()),
        "sampler_logprob_difference_max": float(np.abs(difference).max()),
    }


def _rewards(inputs: StepInputs) -> StepRecord:
    """Mean reward, the share of right rows, and the share of prompts whose rows all have the same reward."""
    if inputs.rewards is None:
        return {}
    known = ~np.isnan(inputs.rewards.rows)
    rewards, groups = inputs.rewards.rows[known], inputs.rewards.groups[known]
    spreads = [np.ptp(rewards[groups == group]) for group in np.unique(groups)]
    return {
        "reward_mean": _mean(rewards),
        "reward_correct_fraction": _mean(inputs.rewards.correct[known]),
        "reward_groups_without_spread": _mean(np.equal(spreads, 0.0)) if spreads else None,
        "rows_without_reward": inputs.rows_without_reward,
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _weighted_mean(values: Any, weights: Any) -> float | None:
    total = float(np.sum(weights))
    return float(np.sum(values * weights) / total) if total > 0 else None


class MetricsLog:
    """Appends one record per step, to ``metrics.jsonl`` and for TensorBoard. It resumes at ``first_step``.

    Records that a lost run wrote from there on are dropped; TensorBoard's files are made anew from the records before
    it, so that each step appears once.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        path, board = folder / METRICS, folder / BOARD
        written = path.stat().st_mtime if path.exists() else time.time()
        self.earlier, self.lost = resume_log(folder, METRICS, first_step, range(first_step))
        """The records so far; and a sentence that names the lost ones, empty if none is."""
        for events in board.glob("events.out.tfevents.*"):
            if self.lost:
                set_aside(folder, f"{BOARD}/{events.name}")
            else:
                events.unlink()
        self._board = FileWriter(str(board))
        for record, ended in zip(self.earlier, _ends(self.earlier, written), strict=True):
            self._board.add_summary(_summary(record), record["step"], ended)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        """Append a record; it has a ``step``."""
        self._stream.write(log_line(_finite(record)))
        self._stream.flush()
        self._board.add_summary(_summary(record), record["step"])

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never is ahead of the metrics."""
        os.fsync(self._stream.fileno())
        self._board.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._board.close()


def _finite(record: StepRecord) -> StepRecord:
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}


def _summary(record: StepRecord) -> Summary:
    numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])


def _ends(records: Sequence[StepRecord], last: float) -> list[float]:
    """When the steps ended (Unix time), if the last one did at ``last`` and nothing was between them."""
    ends = []
    for record in reversed(records):
        ends.append(last)
        last -= float(record.get("time_total") or 0.0)
    return ends[::-1]
