"""Token weights, and advantages that look beyond one token: detached statistics of a whole step (numpy).

They are computed once per step over the student's T tokens of all rows, before micro-batches are cut, so that
no result depends on how a step is cut up. ``rows`` ``[T]`` numbers the row of each token; tokens of a row are
adjacent and in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tropd.pipeline.objectives.rewards.advantages import StepRewards, dual_perplexity
from tropd.pipeline.objectives.token_weight_specs import RowRatio, TokenWeight
from tropd.storage.arrays import Floats64, Ints


@dataclass(frozen=True)
class TokenStatistics:
    """Inputs of token weights, per student token ``[T]``. Optional ones only where an objective needs them."""

    rows: Ints
    advantages: Floats64
    """log π_T - log π_S, floored."""
    student_entropy: Floats64 | None = None
    """Nats, full vocabulary."""
    divergence: Floats64 | None = None
    """KL(π_S‖π_T) over the alternatives and the tail."""
    overlap: Floats64 | None = None
    """Share of the teacher's top k that is in the student's top k."""
    gain: Floats64 | None = None
    """log π_T - log π_ref, both floored: the teacher's gain over the reference model."""
    student_logprobs: Floats64 | None = None
    """log π_S of the tokens, as the sampler has it."""
    teacher_entropy: Floats64 | None = None
    """Nats, full vocabulary."""
    teacher_mass: Floats64 | None = None
    """The teacher's probability of all alternatives together."""
    rewards: StepRewards | None = None
    """Of the step's rows."""

    @property
    def teacher_logprobs(self) -> Floats64:
        """``[T]`` log π_T, floored."""
        return self.advantages + _needed(self.student_logprobs, "student log-prob")


def token_weight(spec: TokenWeight, statistics: TokenStatistics, progress: float) -> Floats64:
    """``[T]`` weight of one specification at ``progress`` (share of the training steps done); 1 outside its phase."""
    ones = np.ones(len(statistics.rows))
    if len(ones) == 0 or not spec.since <= progress < spec.until:
        return ones
    if spec.kind == "student_entropy_top":
        return top_fraction(_needed(statistics.student_entropy, "student entropy"), spec.fraction)
    if spec.kind == "advantage_floor":
        return (statistics.advantages >= spec.floor).astype(np.float64)
    if spec.kind == "soft_or_top":
        score = soft_or(
            _needed(statistics.student_entropy, "student entropy"),
            _needed(statistics.divergence, "divergence"),
        )
        return top_fraction(score, spec.fraction)
    if spec.kind == "prefix_importance":
        return prefix_importance(np.abs(statistics.advantages), statistics.rows, spec.gamma)
    if spec.kind == "student_logprob_bottom":
        return bottom_fraction(_needed(statistics.student_logprobs, "student log-prob"), spec.fraction)
    if spec.kind == "teacher_likely_rows":
        return likely_rows(statistics.teacher_logprobs, statistics.rows, spec.dropped)
    if spec.kind == "entropy_product":
        teacher = _needed(statistics.teacher_entropy, "teacher entropy")
        student = _needed(statistics.student_entropy, "student entropy")
        return (1.0 + spec.alpha * (1.0 - _of_max(teacher))) * (1.0 + spec.beta * _of_max(student))
    if spec.kind == "teachability_top":
        score = within_quantiles(_needed(statistics.divergence, "divergence")) * within_quantiles(
            _needed(statistics.teacher_mass, "teacher's mass on the alternatives")
        )
        return top_fraction(score, spec.fraction)
    if spec.kind == "row_ratio":
        return row_ratio(spec, statistics.advantages, statistics.rows)
    if spec.kind == "position":
        return position_weight(statistics.rows, spec.least, spec.middle, spec.width)
    if spec.kind == "dual_perplexity":
        if statistics.rewards is None:
            raise ValueError("this token weight needs the rewards of the rows")
        student = _needed(statistics.student_logprobs, "student log-prob")
        weights = dual_perplexity(
            student, statistics.teacher_logprobs, statistics.rows, statistics.rewards, spec.temperature
        )
        return weights[statistics.rows]
    drifted = _needed(statistics.overlap, "overlap") < spec.threshold
    return (
        np.clip(1.0 - spec.drop * running_sum(drifted.astype(np.float64), statistics.rows), 0.0, 1.0)
        + spec.base
    )


def top_fraction(values: Floats64, fraction: float) -> Floats64:
    """1 for the ⌈fraction·T⌉ largest values (and ties with the smallest of them), 0 elsewhere."""
    keep = max(1, int(np.ceil(fraction * len(values))))
    threshold = np.partition(values, len(values) - keep)[len(values) - keep]
    return (values >= threshold).astype(np.float64)


def bottom_fraction(values: Floats64, fraction: float) -> Floats64:
    """1 for the ⌊fraction·T⌋ smallest values, at least one (and ties with the largest of them), 0 elsewhere (OPSA)."""
    keep = max(1, int(fraction * len(values)))
    return (values <= np.partition(values, keep - 1)[keep - 1]).astype(np.float64)


def likely_rows(teacher_logprobs: Floats64, rows: Ints, dropped: float) -> Floats64:
    """1 in rows whose mean log π_T reaches the ``dropped`` quantile of these means, 0 elsewhere (FiRe-OPD's code)."""
    means = row_sum(teacher_logprobs, rows) / row_sum(np.ones_like(teacher_logprobs), rows)
    first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    return (means >= np.quantile(means[first], dropped)).astype(np.float64)


def row_ratio(spec: RowRatio, advantages: Floats64, rows: Ints) -> Floats64:
    """exp(mean_t l_t / τ) over a row's tokens with l_t = min(log π_S - log π_T, c) ≥ threshold, divided by the mean over
    rows, at most ``largest`` (ReNIO's code)."""
    ratios = np.minimum(-advantages, spec.most)
    chosen = (ratios >= spec.threshold).astype(np.float64)
    mean = row_sum(ratios * chosen, rows) / np.maximum(row_sum(chosen, rows), 1.0)
    weights = np.exp(mean / spec.temperature)
    first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    return np.minimum(weights / weights[first].mean(), spec.largest)


def within_quantiles(values: Floats64) -> Floats64:
    """clip((z - Q05)/(Q95 - Q05), 0, 1); 0 where the quantiles are one (TA-OPD, arXiv 2605.26844)."""
    low, high = np.quantile(values, (0.05, 0.95))
    return np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(values)


def soft_or(entropy: Floats64, divergence: Floats64) -> Floats64:
    """h + d - h·d of min-max normalized entropy and divergence (TIP, arXiv 2604.14084)."""
    h, d = _min_max(entropy), _min_max(divergence)
    return h + d - h * d


def prefix_importance(magnitudes: Floats64, rows: Ints, gamma: float) -> Floats64:
    """1 + γ(1 - Σ_{i<t}|A_i| / Σ_i|A_i|) within each row (IW-OPD, arXiv 2606.22600)."""
    before = running_sum(magnitudes, rows) - magnitudes
    total = row_sum(magnitudes, rows)
    share = np.divide(before, total, out=np.zeros_like(before), where=total > 0)
    return 1.0 + gamma * (1.0 - share)


def position_weight(rows: Ints, least: float, middle: float, width: float) -> Floats64:
    """least + (1 - least)·σ((u - middle)/width), u = (t - ½)/n at the t-th of a row's n tokens (arXiv 2605.21606)."""
    ones = np.ones(len(rows))
    place = (running_sum(ones, rows) - 0.5) / np.maximum(row_sum(ones, rows), 1.0)
    # tanh has no overflow, wherever it is asked.
    return least + (1.0 - least) * 0.5 * (1.0 + np.tanh(0.5 * (place - middle) / width))


def mean_of_later(values: Floats64, rows: Ints) -> Floats64:
    """For each token the mean of its row's later values; 0 for the last token (TOP-D, eq. 8)."""
    later = row_sum(values, rows) - running_sum(values, rows)
    count = row_sum(np.ones_like(values), rows) - running_sum(np.ones_like(values), rows)
    return np.divide(later, count, out=np.zeros_like(values), where=count > 0)


def standardize_by_group(values: Floats64, groups: Ints) -> Floats64:
    """(value - mean)/max(std, 1e-6) over all tokens of a group (the rollouts of one prompt)."""
    mean = row_sum(values, groups) / row_sum(np.ones_like(values), groups)
    variance = row_sum((values - mean) ** 2, groups) / row_sum(np.ones_like(values), groups)
    return (values - mean) / np.maximum(np.sqrt(variance), 1e-6)


def row_sum(values: Floats64, rows: Ints) -> Floats64:
    """``[T]`` each token gets the sum over its row (or any integer label)."""
    if len(values) == 0:
        return values
    sums: Floats64 = np.bincount(rows, weights=values)[rows].astype(np.float64)
    return sums


def running_sum(values: Floats64, rows: Ints) -> Floats64:
    """``[T]`` inclusive cumulative sum that restarts at each row; tokens of a row are adjacent."""
    if len(values) == 0:
        return values
    total = np.cumsum(values)
    first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    offset = np.repeat(total[first] - values[first], np.diff(np.append(first, len(values))))
    return total - offset


def _min_max(values: Floats64) -> Floats64:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def _of_max(values: Floats64) -> Floats64:
    return np.clip(values / max(values.max(), 1e-6), 0.0, 1.0)


def _needed(values: Floats64 | None, name: str) -> Floats64:
    if values is None:
        raise ValueError(f"this token weight needs the {name} of each token")
    return values
