"""Partition rules as data; ``partition.py`` applies them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tropd.pipeline.objectives.spec import MOST_FACTOR, Spec


class AllTrusted(Spec):
    """Every student token is trusted; none is an outlier."""

    rule: Literal["all"] = "all"


class NoneTrusted(Spec):
    """Every student token is an outlier: the outlier estimator applies everywhere."""

    rule: Literal["none"] = "none"


class SampledPartition(Spec):
    """Trust with probability min(π_T/π_S, 1), drawn per token from a seeded generator (TrOPD)."""

    rule: Literal["sampled"] = "sampled"


class ExpectedPartition(Spec):
    """Both regions at once, weighted by P_trust and 1 - P_trust: the sampled rule's expectation."""

    rule: Literal["expected"] = "expected"


class RatioPartition(Spec):
    """Trust where min(π_T/π_S, 1) ≥ threshold; at threshold 1 the tokens that the teacher likes at least as much."""

    rule: Literal["ratio"] = "ratio"
    threshold: float = Field(default=1.0, ge=0.0, le=1.0)
    """Smallest acceptance ratio that is trusted."""


class SignPartition(Spec):
    """Trust where the teacher likes the token more than the student does: π_T - π_S > margin (AOPD)."""

    rule: Literal["sign"] = "sign"
    margin: float = Field(default=0.0, ge=-1.0, le=1.0)
    """τ: 0 is the sign of the advantage, -1 trusts every token (OPD), 1 none."""


class TeacherEntropyPartition(Spec):
    """Every token is trusted; where the teacher's entropy reaches the threshold, the outlier estimator is added."""

    rule: Literal["teacher_entropy"] = "teacher_entropy"
    threshold: float = Field(default=0.8, ge=0.0, le=MOST_FACTOR)
    """Full-vocabulary teacher entropy in nats from which a token counts (EOPD: 0.8)."""


class RewardPartition(Spec):
    """Trust the rows whose reward reaches reward.correct_from; the tokens of all others are outliers (SCOPE)."""

    rule: Literal["reward"] = "reward"


Partition = Annotated[
    AllTrusted
    | NoneTrusted
    | SampledPartition
    | ExpectedPartition
    | RatioPartition
    | SignPartition
    | TeacherEntropyPartition
    | RewardPartition,
    Field(discriminator="rule"),
]

TOKEN_RULES = ("sampled", "expected", "ratio", "sign")
"""Partition rules that look at the token that was drawn, not only at where it was drawn."""
