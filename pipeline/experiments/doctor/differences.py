"""Differences between two parts of a run, their limits, and their effect on the objective's partition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tropd.pipeline.models.engines.proof import TOLERANCES
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import acceptance, partition_tokens
from tropd.pipeline.objectives.partition_specs import TOKEN_RULES
from tropd.storage.arrays import Floats32

MEAN_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Mean differences in nats per token that rounding explains; for single tokens see ``proof.TOLERANCES``."""


@dataclass(frozen=True)
class NamedLogprobs:
    """A part of the run that computes log-probs, with its log-probs of T tokens."""

    name: str
    precision: torch.dtype
    """Precision of its matrix products."""
    logprobs: Floats32
    """``[T]``."""


@dataclass(frozen=True)
class Difference:
    """Two parts on the same tokens: absolute differences of log-probs, in nats."""

    one: str
    other: str
    mean: float | None
    """None, as the others, where no token has a finite log-prob in both."""
    p99: float | None
    largest: float | None
    lowest_weight: float | None
    """Smallest importance weight exp(one - other)."""
    highest_weight: float | None
    mean_limit: float
    token_limit: float
    """Limit of one token; for a log-prob below -1, the same as a share of it."""
    beyond: int
    """Tokens above that limit, or without a finite log-prob in one part only."""

    @property
    def sound(self) -> bool:
        """True if rounding explains it."""
        return self.beyond == 0 and self.mean is not None and self.mean <= self.mean_limit


@dataclass(frozen=True)
class FalseOutliers:
    """The partition's outliers between a student and a teacher with the same weights."""

    rejected: float
    """Mean of 1 - min(π_T/π_S, 1): the share that ``sampled`` would draw, in expectation."""
    share: float
    """Share of the tokens, by their weight, that the configured rule takes for outliers because of them."""
    rule: str
    with_teacher: float | None
    """Share of all outliers with the configured teacher, if it was asked."""


def difference(one: NamedLogprobs, other: NamedLogprobs, mean_limit: float | None = None) -> Difference:
    """Figures of two parts; the coarser one's precision decides the limits.

    Args:
        mean_limit: another one for the mean; single tokens then have the limit of bfloat16.
    """
    coarse = mean_limit is not None or min(one.precision.itemsize, other.precision.itemsize) < 4
    precision = torch.bfloat16 if coarse else torch.float32
    a, b = one.logprobs.astype(np.float64), other.logprobs.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    lost = int((~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
    signed = a[finite] - b[finite]
    size = np.abs(signed)
    allowed = TOLERANCES[precision] * np.maximum(1.0, np.abs(b[finite]))
    none = len(signed) == 0
    return Difference(
        one=one.name,
        other=other.name,
        mean=None if none else float(size.mean()),
        p99=None if none else float(np.quantile(size, 0.99)),
        largest=None if none else float(size.max()),
        lowest_weight=None if none else float(np.exp(signed.min())),
        highest_weight=None if none else float(np.exp(min(signed.max(), 700.0))),
        mean_limit=MEAN_LIMITS[precision] if mean_limit is None else mean_limit,
        token_limit=TOLERANCES[precision],
        beyond=lost + int((size > allowed).sum()),
    )


def false_outliers(
    objective: Objective,
    student: Floats32,
    as_teacher: Floats32,
    uniforms: npt.NDArray[np.float64],
    with_teacher: Floats32 | None,
) -> FalseOutliers:
    """The tokens that an objective would take for outliers of a student that is its own teacher.

    Args:
        student: ``[T]`` log-probs of the sampler.
        as_teacher: ``[T]`` of the same weights, as the teacher is scored.
        uniforms: ``[T]`` the draws of the partition.
        with_teacher: ``[T]`` weights of the outliers with the configured teacher.
    """
    rule = objective.partition.rule
    share = 0.0
    if rule in TOKEN_RULES:
        weights = [
            partition_tokens(
                objective.partition, student_logprobs=student, teacher_logprobs=teacher, uniforms=uniforms
            ).outlier
            for teacher in (as_teacher, student)
        ]
        share = float(np.maximum(weights[0] - weights[1], 0.0).mean())
    return FalseOutliers(
        rejected=float(np.nan_to_num(1.0 - acceptance(student, as_teacher), nan=1.0).mean()),
        share=share,
        rule=rule,
        with_teacher=None if with_teacher is None else float(with_teacher.mean()),
    )


def meaning(objective: Objective, found: FalseOutliers) -> str:
    """A sentence on the effect of false outliers on a run with this objective."""
    if found.rule not in TOKEN_RULES:
        return f"partition {found.rule!r} of {objective.name} ignores this: no token changes its region"
    words = (
        f"with the student in the teacher's place, partition {found.rule!r} of {objective.name} takes "
        f"{found.share:.2%} of its tokens for outliers, though none exist"
    )
    estimators = (objective.trust.loss.estimator, objective.outlier.loss.estimator)
    effect = f": {_EFFECTS[estimators[1]]}" if found.share and estimators[0] != estimators[1] else ""
    if found.with_teacher is None:
        return f"{words}{effect}"
    return f"{words}{effect}; with the configured teacher {found.with_teacher:.2%} of the tokens are outliers"


_EFFECTS = {
    "zero": "they would have no part in the loss",
    "k1": "their advantage would be bounded",
    "nll": "their likelihood would be raised",
    "topk_fkl": "they would learn from the teacher's most likely tokens instead",
    "topk_rkl": "they would learn from the teacher's most likely tokens instead",
    "topk_jsd": "they would learn from the teacher's most likely tokens instead",
}


def advice(found: Sequence[Difference]) -> list[str]:
    """A line for every difference that rounding does not explain."""
    lines = []
    for one in found:
        if not one.sound:
            mean = "none" if one.mean is None else f"{one.mean:.2g}"
            lines.append(
                f"{one.one} and {one.other} differ by more than rounding explains: mean {mean} (limit "
                f"{one.mean_limit:g}), {one.beyond} tokens beyond {one.token_limit:g} nats (or times their log-prob)"
            )
    return lines
