"""Token weights as data: which of the student's tokens count, and how much. The formulas are in ``token_weights.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tropd.pipeline.objectives.spec import MOST_FACTOR, Spec


class _Phase(Spec):
    since: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the training steps after which this weight starts to apply."""
    until: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the training steps after which it stops."""

    @model_validator(mode="after")
    def _ordered(self) -> _Phase:
        if self.since >= self.until:
            raise ValueError(f"since ({self.since}) must be less than until ({self.until})")
        return self


class StudentEntropyTop(_Phase):
    """Only the given share of tokens with the highest student entropy (Entropy-OPD, REOPOLD phase II)."""

    kind: Literal["student_entropy_top"] = "student_entropy_top"
    fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the student's tokens in the global batch that is kept."""


class AdvantageFloorMask(_Phase):
    """Only tokens whose log π_T - log π_S is at least the floor (REOPOLD phase I)."""

    kind: Literal["advantage_floor"] = "advantage_floor"
    floor: float = Field(default=-2.558427881104495, ge=-MOST_FACTOR, lt=0.0)
    """Smallest log-ratio that is kept; the default is log(λ)/(1-λ) at λ = 0.1."""


class SoftOrTop(_Phase):
    """The share of tokens with the highest h + d - h·d of student entropy h and divergence d (TIP)."""

    kind: Literal["soft_or_top"] = "soft_or_top"
    fraction: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the student's tokens in the global batch that is kept (ρ)."""


class PrefixImportance(_Phase):
    """1 + γ(1 - share of Σ|A| that lies before the token): early tokens weigh more (IW-OPD)."""

    kind: Literal["prefix_importance"] = "prefix_importance"
    gamma: float = Field(default=0.5, ge=0.0, le=MOST_FACTOR)
    """γ."""


class OverlapDrift(_Phase):
    """clamp(1 - drop·(tokens so far whose top-k overlap is below the threshold), 0, 1) + base (Prune-OPD)."""

    kind: Literal["overlap_drift"] = "overlap_drift"
    threshold: float = Field(default=0.7, ge=0.0, le=1.0)
    """Overlap of student's and teacher's top k below which a token counts as drift."""
    drop: float = Field(default=0.01, ge=0.0, le=MOST_FACTOR)
    """Weight lost per drifted token."""
    base: float = Field(default=0.5, ge=0.0, le=MOST_FACTOR)
    """Weight that remains."""


class StudentLogprobBottom(_Phase):
    """Only the given share of tokens with the lowest log π_S (OPSA)."""

    kind: Literal["student_logprob_bottom"] = "student_logprob_bottom"
    fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the student's tokens in the global batch that is kept."""


class TeacherLikelyRows(_Phase):
    """Only rows whose mean log π_T is not among the lowest (FiRe-OPD)."""

    kind: Literal["teacher_likely_rows"] = "teacher_likely_rows"
    dropped: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Quantile of the rows' mean teacher log-probs below which a row counts nothing."""


class EntropyProduct(_Phase):
    """(1 + α(1 - H_T/max H_T))·(1 + β·H_S/max H_S), maxima over the step: sure teacher, unsure student (FiRe-OPD)."""

    kind: Literal["entropy_product"] = "entropy_product"
    alpha: float = Field(default=1.0, ge=0.0, le=MOST_FACTOR)
    """α: weight of the teacher's confidence."""
    beta: float = Field(default=1.0, ge=0.0, le=MOST_FACTOR)
    """β: weight of the student's doubt."""


class TeachabilityTop(_Phase):
    """The share of tokens with the highest product of divergence and the teacher's mass on the alternatives (TA-OPD)."""

    kind: Literal["teachability_top"] = "teachability_top"
    fraction: float = Field(default=0.05, gt=0.0, le=1.0)
    """Share of the student's tokens in the global batch that is kept."""


class RowRatio(_Phase):
    """exp(mean of min(log π_S - log π_T, most) over a row's tokens at or above the threshold), over its mean (ReNIO)."""

    kind: Literal["row_ratio"] = "row_ratio"
    threshold: float = Field(default=1.0, ge=-MOST_FACTOR, le=MOST_FACTOR)
    """Log-ratio from which a token takes part; a row without such tokens has weight 1."""
    most: float = Field(default=2.0, ge=-MOST_FACTOR, le=MOST_FACTOR)
    """Log-ratios above this count as this."""
    temperature: float = Field(default=1.0, gt=0.0, le=MOST_FACTOR)
    """Divisor of the mean log-ratio."""
    largest: float = Field(default=10.0, gt=0.0, le=MOST_FACTOR)
    """Largest weight, after division by the mean over rows."""


class LateTokens(_Phase):
    """least + (1 - least)·σ((place - middle)/width) at the token's place in its row, 0 to 1: late tokens weigh more
    (PW-OPSD)."""

    kind: Literal["position"] = "position"
    least: float = Field(default=0.25, ge=0.0, le=1.0)
    """w_min: smallest weight."""
    middle: float = Field(default=0.3, ge=0.0, le=1.0)
    """τ: place at which the weight is half way."""
    width: float = Field(default=0.1, gt=0.0, le=MOST_FACTOR)
    """s: the smaller, the steeper."""


class DualPerplexity(_Phase):
    """PPL_S^(1/τ) for right rows and PPL_T^(-1/τ) for wrong ones, each with mean 1 over those of a prompt (SCOPE)."""

    kind: Literal["dual_perplexity"] = "dual_perplexity"
    temperature: float = Field(default=1.0, gt=0.0, le=MOST_FACTOR)
    """τ: the larger, the more alike are the weights."""


TokenWeight = Annotated[
    StudentEntropyTop
    | AdvantageFloorMask
    | SoftOrTop
    | PrefixImportance
    | OverlapDrift
    | StudentLogprobBottom
    | TeacherLikelyRows
    | EntropyProduct
    | TeachabilityTop
    | RowRatio
    | LateTokens
    | DualPerplexity,
    Field(discriminator="kind"),
]

STUDENT_PASS_WEIGHTS = (
    "student_entropy_top",
    "soft_or_top",
    "overlap_drift",
    "entropy_product",
    "teachability_top",
)
"""Token weights that look at the student's whole distribution at every token."""
DIVERGENCE_WEIGHTS = ("soft_or_top", "teachability_top")
"""Token weights that look at the KL over the alternatives and the tail."""
TOPK_WEIGHTS = (*DIVERGENCE_WEIGHTS, "overlap_drift")
"""Token weights that look at the alternatives of every token."""
