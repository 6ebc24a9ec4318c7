"""Verdicts from a run's metrics, while it trains or afterward. Reads columns of numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from tropd.pipeline.report.data.facts import Verdict
from tropd.pipeline.report.data.training_metrics import total_of_servers
from tropd.pipeline.report.page.formats import percent
from tropd.pipeline.report.verdicts.verdict_rules import LIMITS, RULES

Columns = Mapping[str, Sequence[float | None]]
"""Metrics, each with a value per step."""
MetricsRows = Sequence[Mapping[str, float]]
"""Per step, the metrics that are known of those that are used here."""
Points = list[tuple[int, float]]
"""(step, value), where the value is known."""
_DISTANCE = "distance_reverse_kl"
_USED = (
    "loss",
    "k1_mean",
    "acceptance_mean",
    "student_entropy",
    "region_fraction_trust",
    "region_fraction_outlier",
    "prefix_length_mean",
    "response_length_mean",
    "truncated_fraction",
    "tokens_on_policy",
    "grad_norm",
    "sampler_logprob_difference_max",
    "teacher_retries",
    "reward_mean",
    "reward_groups_without_spread",
)


def verdict(name: str, sentence: str, *evidence: str) -> Verdict:
    """A verdict by the rule of that name."""
    rule = RULES[name]
    return Verdict(
        name=name, level=rule.level, sentence=sentence, evidence=list(evidence), advice=rule.advice
    )


def columns_of(records: Sequence[Mapping[str, Any]]) -> Columns:
    """The metrics that verdicts use, as columns. Retries, which are counted by server, are added up."""
    return {
        name: [_number(total_of_servers(record.get(name))) for record in records]
        for name in ("step", _DISTANCE, *_USED)
    }


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def training_verdicts(columns: Columns, settings: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts on the steps so far.

    Args:
        columns: metrics per step, with ``step``.
        settings: values by dotted path. Used are ``objective.rollouts``, ``objective.reward.kind``, ``train.steps``,
            ``train.max_grad_norm``; where one is missing, the verdicts that need it are not given.
    """
    rows = _rows(columns)
    found = [
        _no_student_token(rows, settings),
        _never_stops(rows),
        _grows(rows, "k1-rising", "K1", lambda row: row.get("k1_mean"), LIMITS.k1_factor, LIMITS.k1_rise),
        _grows(
            rows,
            "loss-rising",
            "The loss",
            lambda row: row.get("loss"),
            LIMITS.loss_factor,
            LIMITS.loss_rise,
        ),
        _grows(
            rows,
            "outliers-growing",
            "The share of tokens that the teacher rejects",
            _outlier_share,
            LIMITS.outlier_factor,
            LIMITS.outlier_rise,
            percent,
        ),
        _grows(
            rows,
            "entropy-rising",
            "The student's entropy",
            lambda row: row.get("student_entropy"),
            LIMITS.entropy_factor,
            LIMITS.entropy_rise,
        ),
        _distance_grew(columns),
        _entropy_collapsed(rows),
        _teacher_rejects(rows),
        _far_from_teacher(rows),
        _gradient_clipped(rows, settings),
        _sampler_mismatch(rows, settings),
        _rewards_alike(rows, settings),
        _teacher_retries(rows),
    ]
    return [one for one in found if one is not None]


def _rows(columns: Columns) -> MetricsRows:
    """The known values of each step; lines that hold an evaluation only are left out."""
    names = [name for name in _USED if name in columns]
    rows = []
    for index, step in enumerate(columns.get("step", ())):
        row = {name: value for name in names if (value := columns[name][index]) is not None}
        if step is not None and row:
            rows.append({"step": step, **row})
    return rows


def _points(rows: MetricsRows, name: str) -> Points:
    return [(int(row["step"]), row[name]) for row in rows if name in row]


def _ends(points: Points) -> tuple[Points, Points] | None:
    """The first and the last part of the steps; None where there are too few."""
    if len(points) < LIMITS.fewest_steps:
        return None
    size = max(3, round(LIMITS.part * len(points)))
    return points[:size], points[-size:]


def _mean(points: Points) -> float:
    return fmean(value for _, value in points)


def _steps(points: Points) -> str:
    return f"steps {points[0][0]} to {points[-1][0]}"


def _grows(
    rows: MetricsRows,
    name: str,
    what: str,
    value: Callable[[Mapping[str, float]], float | None],
    factor: float,
    rise: float,
    form: Callable[[float], str] = "{:.3g}".format,
) -> Verdict | None:
    """A metric that is ``factor`` times its first value and ``rise`` more, on steps without much of a prefix."""
    points = [(int(row["step"]), found) for row in _on_policy(rows) if (found := value(row)) is not None]
    ends = _ends(points)
    if ends is None:
        return None
    early, late = _mean(ends[0]), _mean(ends[1])
    if late < early + rise or late < factor * abs(early):
        return None
    evidence = f"{form(early)} in {_steps(ends[0])}, {form(late)} in {_steps(ends[1])}"
    unit = "" if form is percent or name == "loss-rising" else " nats per token"
    return verdict(name, f"{what} grew from {form(early)} to {form(late)}{unit}.", evidence)


def _on_policy(rows: MetricsRows) -> MetricsRows:
    """Steps without much of a prefix."""
    most = LIMITS.with_prefix
    return [
        row
        for row in rows
        if row.get("prefix_length_mean", 0.0) <= most * row.get("response_length_mean", math.inf)
    ]


def _outlier_share(row: Mapping[str, float]) -> float | None:
    trust, outlier = row.get("region_fraction_trust"), row.get("region_fraction_outlier")
    if trust is None or outlier is None or trust + outlier == 0:
        return None
    return outlier / (trust + outlier)


def _no_student_token(rows: MetricsRows, settings: Mapping[str, Any]) -> Verdict | None:
    planned = settings.get("train.steps")
    if settings.get("objective.rollouts") != "student" or not isinstance(planned, int):
        return None
    empty = [step for step, tokens in _points(rows, "tokens_on_policy") if tokens == 0]
    # Of a few steps one says nothing; a trial without any student's token has tried nothing.
    share = LIMITS.no_student if planned >= LIMITS.fewest_steps else 1.0
    if len(empty) < share * planned:
        return None
    return verdict(
        "no-student-token",
        f"In {len(empty)} of {planned} steps the student wrote nothing: the teacher's prefixes were whole responses.",
        f"steps without a token of the student's: the first {empty[0]}, the last {empty[-1]}",
    )


def _never_stops(rows: MetricsRows) -> Verdict | None:
    ends = _ends(_points(_on_policy(rows), "truncated_fraction"))
    if ends is None or (late := _mean(ends[1])) < LIMITS.cut:
        return None
    return verdict(
        "never-stops",
        f"The student does not stop: {percent(late)} of its responses are cut off at the length limit.",
        f"truncated in {_steps(ends[0])}: {percent(_mean(ends[0]))}; in {_steps(ends[1])}: {percent(late)}",
    )


def _distance_grew(columns: Columns) -> Verdict | None:
    points = [
        (int(step), value)
        for step, value in zip(columns.get("step", ()), columns.get(_DISTANCE, ()), strict=False)
        if step is not None and value is not None
    ]
    if len(points) < LIMITS.fewest_distances:
        return None
    best, last = min(points, key=lambda point: point[1]), points[-1]
    if last[1] < LIMITS.again * best[1] or last[1] < best[1] + LIMITS.again_rise:
        return None
    return verdict(
        "distance-grew",
        f"The student moves away from the teacher again: reverse KL {last[1]:.3g} nats per token, after {best[1]:.3g}.",
        f"least at step {best[0]}: {best[1]:.3g}; at step {last[0]}: {last[1]:.3g}",
    )


def _entropy_collapsed(rows: MetricsRows) -> Verdict | None:
    entropy, accepted = (_ends(_points(rows, name)) for name in ("student_entropy", "acceptance_mean"))
    if entropy is None or accepted is None:
        return None
    low, share = _mean(entropy[1]), _mean(accepted[1])
    if low > LIMITS.entropy_low or share > LIMITS.acceptance_low:
        return None
    return verdict(
        "entropy-collapsed",
        f"The student is sure of what the teacher rejects: entropy {low:.2g} nats, {percent(share)} accepted.",
        f"entropy {_mean(entropy[0]):.2g} in {_steps(entropy[0])}, {low:.2g} in {_steps(entropy[1])}",
        f"acceptance {percent(_mean(accepted[0]))} in {_steps(accepted[0])}, {percent(share)} in {_steps(accepted[1])}",
    )


def _teacher_rejects(rows: MetricsRows) -> Verdict | None:
    ends = _ends(_points(_on_policy(rows), "acceptance_mean"))
    if ends is None:
        return None
    early, late = _mean(ends[0]), _mean(ends[1])
    if late >= LIMITS.accepted or late >= early + LIMITS.accepted_rise:
        return None
    evidence = f"{percent(early)} in {_steps(ends[0])}, {percent(late)} in {_steps(ends[1])}"
    sentence = f"The teacher accepts only {percent(late)} of what the student writes."
    return verdict("teacher-rejects", sentence, evidence)


def _far_from_teacher(rows: MetricsRows) -> Verdict | None:
    ends = _ends(_points(_on_policy(rows), "k1_mean"))
    if ends is None or (late := _mean(ends[1])) < LIMITS.far:
        return None
    evidence = f"{_mean(ends[0]):.3g} in {_steps(ends[0])}, {late:.3g} in {_steps(ends[1])}"
    sentence = f"The student is still far from the teacher: K1 is {late:.3g} nats per token."
    return verdict("far-from-teacher", sentence, evidence)


def _gradient_clipped(rows: MetricsRows, settings: Mapping[str, Any]) -> Verdict | None:
    limit = settings.get("train.max_grad_norm")
    points = _points(rows, "grad_norm")
    if not isinstance(limit, int | float) or len(points) < LIMITS.fewest_steps:
        return None
    late = points[len(points) // 2 :]
    clipped = sum(norm > limit for _, norm in late) / len(late)
    middle = median(norm for _, norm in late)
    if clipped < LIMITS.clipped or middle < LIMITS.clip_factor * limit:
        return None
    return verdict(
        "gradient-clipped",
        f"The gradient is always clipped: its norm is {middle:.3g} at the median, {middle / limit:.0f} times the limit.",
        f"clipped in {percent(clipped)} of {_steps(late)}; train.max_grad_norm is {limit:g}",
    )


def _sampler_mismatch(rows: MetricsRows, settings: Mapping[str, Any]) -> Verdict | None:
    """Stored rollouts are of an older student on purpose."""
    ends = _ends(_points(rows, "sampler_logprob_difference_max"))
    if ends is None or settings.get("objective.rollouts") != "student":
        return None
    middle = median(value for _, value in ends[1])
    if middle < LIMITS.difference:
        return None
    return verdict(
        "sampler-mismatch",
        f"Sampler and trainer disagree: up to {middle:.2g} nats on one token of a step.",
        f"largest difference of a token's log-prob, median of {_steps(ends[1])}: {middle:.3g} nats",
    )


def _rewards_alike(rows: MetricsRows, settings: Mapping[str, Any]) -> Verdict | None:
    """Where responses are compared within their prompt, from the first steps on: once all are right is a success."""
    points = _points(rows, "reward_groups_without_spread")
    ends = _ends(points)
    if ends is None or settings.get("objective.reward.kind") != "group":
        return None
    alike = _mean(points)
    if min(alike, _mean(ends[0])) < LIMITS.alike:
        return None
    rewards = [reward for _, reward in _points(rows, "reward_mean")]
    return verdict(
        "rewards-alike",
        f"For {percent(alike)} of the prompts all responses have the same reward: comparing them teaches nothing.",
        f"mean reward of a step: {min(rewards):.3g} to {max(rewards):.3g}",
    )


def _teacher_retries(rows: MetricsRows) -> Verdict | None:
    points = _points(rows, "teacher_retries")
    retried = [(step, number) for step, number in points if number > 0]
    if len(retried) < max(LIMITS.fewest_retried, LIMITS.retried * len(points)):
        return None
    total = sum(number for _, number in retried)
    return verdict(
        "teacher-retries",
        f"Requests to the teacher were repeated in {len(retried)} of {len(points)} steps.",
        f"{total:.0f} retries, from step {retried[0][0]} to step {retried[-1][0]}",
    )
