"""Objectives as data: partition rule × estimator per region × token weights × guidance × importance.

Everything here is plain configuration (pydantic, TOML); the formulas are in ``partition.py``,
``estimators.py`` and ``token_weights.py``. A named method is a TOML file in ``config/recipes/objectives``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tropd.pipeline.objectives.extrapolation.settings import Extrapolation
from tropd.pipeline.objectives.partition_specs import TOKEN_RULES, AllTrusted, Partition
from tropd.pipeline.objectives.rewards.terms import RewardTerm
from tropd.pipeline.objectives.spec import MOST_FACTOR, Apart, Inert, Spec
from tropd.pipeline.objectives.token_weight_specs import TOPK_WEIGHTS, TokenWeight

# -------------------------------------------------------------------------------------- estimators

Support = Literal["truncated", "tail", "renormalized"]


class Zero(Spec):
    """The region contributes nothing: its tokens are masked out."""

    estimator: Literal["zero"] = "zero"


class K1(Spec):
    """Policy gradient on the sampled token: -sg[A]·log π_S, with A = log π_T - log π_S unless changed below, in this
    order: `reward_scale`, `proximal`, `returns`, `standardize` (or `baseline`), `floor`."""

    estimator: Literal["k1"] = "k1"
    floor: float | None = Field(default=None, ge=-MOST_FACTOR, lt=0.0)
    """Advantages below this are raised to it (REOPOLD, 'clip'); none by default."""
    proximal: float | None = Field(default=None, gt=0.0, le=1.0)
    """α of the proximal teacher α·π_T + (1-α)·π_S: A becomes log(α·e^A + 1-α) (TOP-D)."""
    returns: bool = False
    """Add to each token's reward the mean reward of the tokens after it, in whatever region they are (TOP-D, eq. 8)."""
    standardize: bool = False
    """Subtract the mean and divide by the standard deviation of all tokens of the same prompt's rollouts (TOP-D)."""
    baseline: Literal["none", "kl"] = "none"
    """`kl` adds KL(π_S‖π_T), a state's expected advantage with the sign turned: a control variate (vOPD). It fits the
    advantage of a token alone: not with `returns` or `standardize`."""
    reward_scale: float = Field(default=1.0, gt=0.0, le=MOST_FACTOR)
    """λ: A = λ(log π_T - log π_ref) - (log π_S - log π_ref); 1 is plain K1 (ExOPD: 1.25)."""


class FixedAdvantage(Spec):
    """Policy gradient on the sampled token with an advantage that no teacher decides: -A·log π_S (OPSA)."""

    estimator: Literal["fixed"] = "fixed"
    advantage: float = Field(default=-0.5, ge=-MOST_FACTOR, lt=0.0)
    """A."""
    by_entropy: float = Field(default=0.0, ge=0.0, le=MOST_FACTOR)
    """Subtracted from A at the token with the highest student entropy of those that count, nothing at the lowest,
    in proportion between them."""


class NegativeLogLikelihood(Spec):
    """-log π_S of the given token: on the teacher's tokens, the one-sample forward KL."""

    estimator: Literal["nll"] = "nll"


class TopkForwardKL(Spec):
    """Σ over the teacher's top k of π_T·(log π_T - log π_S)."""

    estimator: Literal["topk_fkl"] = "topk_fkl"
    support: Support = "truncated"
    """`truncated`: raw probabilities, not a KL; `tail`: one more bucket with the rest, a true KL;
    `renormalized`: the teacher's probabilities rescaled to sum to one over the top k."""
    entry_clip: float | None = Field(default=None, gt=0.0, le=MOST_FACTOR)
    """Each id's term is raised to 0 and cut off at this (OPSD, ReNIO: 0.05); none by default. Not with `tail`."""


class TopkReverseKL(Spec):
    """Σ over k alternatives of π_S·(log π_S - log π_T): the teacher's top k, or the student's (`alternatives`)."""

    estimator: Literal["topk_rkl"] = "topk_rkl"
    support: Support = "tail"
    """`tail`: one more bucket with the rest, a true KL; `truncated`: raw probabilities, not a KL;
    `renormalized`: both sides rescaled to sum to one over the alternatives."""
    stop_gradient: bool = False
    """No gradient through log π_S, so that it is Σ ∇π_S·(log π_S - log π_T), without the bias of a truncated sum
    (arXiv 2605.11182). Only with `truncated`: elsewhere the gradient is that anyway."""
    sample_corrected: bool = False
    """Where the drawn token is none of the alternatives, add its own difference from the tail bucket: the expected
    gradient is that of the full reverse KL (arXiv 2608.14728). Only with `tail`."""


class TopkMixture(Spec):
    """λ·KL(π_S‖π_T) + (1-λ)·KL(π_T‖π_S) over k alternatives and the tail bucket (arXiv 2605.16826)."""

    estimator: Literal["topk_mix"] = "topk_mix"
    reverse: float = Field(default=0.5, ge=0.0, le=1.0)
    """λ: 1 is the reverse KL, 0 the forward KL."""


class TopkJSD(Spec):
    """Generalized Jensen-Shannon divergence over the teacher's top k and the tail bucket (GKD)."""

    estimator: Literal["topk_jsd"] = "topk_jsd"
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of the teacher in the mixture β·π_T + (1-β)·π_S."""


Estimator = Annotated[
    Zero
    | K1
    | FixedAdvantage
    | NegativeLogLikelihood
    | TopkForwardKL
    | TopkReverseKL
    | TopkMixture
    | TopkJSD,
    Field(discriminator="estimator"),
]


class Region(Spec):
    """The contribution of one region's tokens to the loss."""

    loss: Estimator = Zero()
    """The estimator."""
    weight: float = Field(default=1.0, ge=0.0, le=MOST_FACTOR)
    """Factor on the region's loss."""


# ------------------------------------------------------------------------------------- the whole


class Schedule(Spec):
    """The share of a teacher trajectory that the student continues from (the curriculum)."""

    kind: Literal["none", "cosine", "constant"] = "none"
    """`cosine`: from `fraction` down to 0 over `steps_share` of the run; `constant`: `fraction` throughout."""
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Prefix length at step 0 as a share of rollout.max_tokens (f0), or of the trajectory (see `unit`)."""
    steps_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the training steps over which a cosine schedule reaches 0."""
    unit: Literal["tokens", "trajectory"] = "tokens"
    """`tokens`: that share of rollout.max_tokens, as the paper; `trajectory`: that share of each row's own trajectory."""
    length: Literal["max", "uniform"] = "max"
    """Per row: the scheduled length itself, or uniform between 0 and it."""


class Importance(Spec):
    """Correction for tokens that were drawn from another distribution μ than the student's own π_θ."""

    clip: float | None = Field(default=None, gt=0.0, le=MOST_FACTOR)
    """c of the detached weight min(π_θ/μ, c) on terms that depend on the sampled token: K1, and the top-k terms of a
    partition by token. Not set: train.importance_clip where μ is not the student's own distribution, else no weight."""


class Objective(Spec):
    """A distillation method. Says what it needs from the teacher through ``teacher_needs``."""

    name: str
    """The method's name."""
    title: Inert[str]
    """One line that describes it."""
    source: Inert[str]
    """Where the definition comes from."""
    confidence: Inert[str] = "exact"
    """Certainty of the definition: exact, or the parts that were reconstructed."""
    formula: Inert[str] = ""
    """The loss, in plain text."""
    own_context: Inert[bool] = False
    """Meant for a teacher with a context of its own (teacher.context); training says so where none has one."""
    rollouts: Literal["student", "teacher", "stored"] = "student"
    """Author of the response: the current student, the teacher (all of it), or a student once, stored on disk."""
    partition: Partition = AllTrusted()
    """How student tokens are split into trust region and outliers."""
    trust: Region = Region(loss=K1())
    """Loss of trusted student tokens."""
    outlier: Region = Region(loss=Zero())
    """Loss of outlier student tokens."""
    guidance: Region = Region(loss=Zero())
    """Loss of the teacher's prefix tokens."""
    schedule: Schedule = Schedule()
    """Length of the teacher prefix over training."""
    token_weights: tuple[TokenWeight, ...] = ()
    """Weights on student tokens, multiplied."""
    reward: Apart[RewardTerm | None] = None
    """The part of a row's reward in the advantages of k1, where the method uses rewards ([reward] says whence)."""
    extrapolation: Apart[Extrapolation | None] = None
    """Extrapolation of the weights after some of the steps, whatever the loss; none by default."""
    importance: Importance = Importance()
    """Correction for rollouts from another distribution."""
    k: int = Field(default=64, ge=1, le=1024)
    """Alternatives per token, wherever a part needs the top k (the vocabulary, if that is smaller)."""
    alternatives: Literal["teacher", "student"] = "teacher"
    """Whose top k that is, at the student's tokens. `student`: the sampler's k likeliest ids, whose log-probs the
    teacher is asked for, at every token. Prefix tokens have the teacher's, from the cache."""
    reduction: Literal["token_mean", "region_mean", "weight_mean", "sequence_mean"] = "token_mean"
    """Denominator: all supervised tokens; per region its own tokens; the sum of weights; or per row, then rows."""

    @property
    def guides(self) -> bool:
        """True if the teacher's prefix tokens have a part in the loss."""
        return self.guidance.loss.estimator != "zero" and self.guidance.weight > 0

    @model_validator(mode="after")
    def _possible(self) -> Objective:
        if reasons := list(_conflicts(self)):
            raise ValueError("\n".join(reasons))
        return self


def _conflicts(objective: Objective) -> Iterator[str]:
    """A line per reason to refuse an objective, with the settings that would do. Fields are named by their paths."""
    guidance = objective.guidance.loss.estimator
    if guidance not in ("zero", "nll", "topk_fkl"):
        yield (
            f"guidance.loss.estimator = {guidance!r}: prefix tokens were written by the teacher, so only zero, nll and "
            "topk_fkl (from the cache) apply"
        )
    for name, loss in (("trust.loss", objective.trust.loss), ("outlier.loss", objective.outlier.loss)):
        if loss.estimator == "nll" and not (name == "trust.loss" and objective.partition.rule == "reward"):
            yield (
                f"{name}.estimator = 'nll' would train the student on its own samples; use k1 or a top-k divergence "
                "(trust.loss may have it with partition.rule = 'reward': on right answers)"
            )
        if isinstance(loss, TopkForwardKL) and loss.entry_clip is not None and loss.support == "tail":
            yield (
                f"{name}.entry_clip is for single ids, and {name}.support = 'tail' adds a bucket of many: set "
                f"{name}.support = 'truncated' or 'renormalized', or leave {name}.entry_clip out"
            )
        if isinstance(loss, TopkReverseKL):
            if loss.stop_gradient and loss.support != "truncated":
                yield (
                    f"{name}.stop_gradient = true changes nothing with {name}.support = {loss.support!r}: set "
                    f"{name}.support = 'truncated', or leave {name}.stop_gradient out"
                )
            if loss.sample_corrected and loss.support != "tail":
                yield (
                    f"{name}.sample_corrected = true completes the tail bucket, which {name}.support = {loss.support!r} "
                    f"lacks: set {name}.support = 'tail', or leave {name}.sample_corrected out"
                )
        if isinstance(loss, K1) and loss.baseline == "kl" and (loss.returns or loss.standardize):
            option = f"{name}.returns" if loss.returns else f"{name}.standardize"
            yield (
                f"{name}.baseline = 'kl' belongs to a token's own advantage, and {option} = true changes that: set "
                f"{option} = false, or {name}.baseline = 'none'"
            )
    yield from _reward_conflicts(objective)
    yield from _rollout_conflicts(objective)
    yield from _without_effect(objective)


def needs_rewards(objective: Objective) -> bool:
    """True if a part of an objective looks at the rewards of rows."""
    term = objective.reward
    return (
        (term is not None and (term.kind == "margin" or term.weight > 0))
        or objective.partition.rule == "reward"
        or any(weight.kind == "dual_perplexity" for weight in objective.token_weights)
    )


def policy_gradients(objective: Objective) -> dict[str, K1]:
    """K1 of the regions that have tokens, by the path of the setting."""
    rule = objective.partition.rule
    losses = {"trust.loss": objective.trust.loss, "outlier.loss": objective.outlier.loss}
    unused = {"all": "outlier.loss", "none": "trust.loss"}.get(rule)
    return {name: loss for name, loss in losses.items() if name != unused and isinstance(loss, K1)}


def _reward_conflicts(objective: Objective) -> Iterator[str]:
    if needs_rewards(objective) and objective.rollouts == "teacher":
        yield (
            "rollouts = 'teacher' has no response of the student that could have a reward: leave reward out, with "
            "partition.rule = 'reward' and the token weight dual_perplexity, or set rollouts = 'student'"
        )
    term = objective.reward
    if term is None:
        return
    found = policy_gradients(objective)
    if not found:
        yield (
            "reward adds to the advantages of k1, and no region has it: set trust.loss.estimator = 'k1', or leave reward "
            "out"
        )
    if term.kind == "group" and term.weight == 0 and term.distillation == 0:
        yield "reward.weight = 0 and reward.distillation = 0 leave nothing to learn from: raise one of them"
    for name, loss in found.items():
        if term.kind == "margin" and loss.baseline == "kl":
            yield (
                f"reward.kind = 'margin' compares advantages before the student is trained, when {name}.baseline = 'kl' "
                f"is not known yet: set {name}.baseline = 'none'"
            )


def _rollout_conflicts(objective: Objective) -> Iterator[str]:
    schedule = objective.schedule
    whole = (schedule.kind, schedule.fraction, schedule.length) == ("constant", 1.0, "max")
    if objective.rollouts == "teacher" and not whole:
        yield (
            "rollouts = 'teacher' needs schedule = { kind = 'constant', fraction = 1.0, length = 'max' }: the whole "
            "response comes from the teacher"
        )
    if objective.rollouts == "stored" and schedule.kind != "none":
        yield "rollouts = 'stored' have no teacher prefix: set schedule.kind = 'none'"
    if objective.rollouts == "stored" and (wanting := entropy_part(objective)):
        yield (
            f"{wanting} needs the teacher's full-vocabulary entropy, which the cache of stored rollouts does not hold: "
            f"set another {wanting.split()[0]}, or rollouts = 'student'"
        )
    if objective.rollouts == "stored" and objective.alternatives == "student":
        yield (
            "alternatives = 'student' are chosen by the student as it is, and the cache of stored rollouts has the "
            "teacher's: set alternatives = 'teacher', or rollouts = 'student'"
        )
    if objective.guides and schedule.kind == "none":
        yield (
            "guidance has a loss but schedule.kind = 'none' gives no prefix tokens; set schedule.kind, or "
            "guidance.loss.estimator = 'zero'"
        )


def entropy_part(objective: Objective) -> str:
    """The setting that needs the teacher's entropy, as an error names it; empty if none does."""
    if objective.partition.rule == "teacher_entropy":
        return "partition.rule = 'teacher_entropy'"
    kinds = [weight.kind for weight in objective.token_weights if weight.kind == "entropy_product"]
    return f"token_weights of kind {kinds[0]!r}" if kinds else ""


def _without_effect(objective: Objective) -> Iterator[str]:
    """Settings that would change nothing, and an objective that nothing is learned from."""
    students = objective.rollouts != "teacher"
    names = _regions_with_tokens(objective)
    learning = learning_regions(objective)
    if not learning:
        ways = (f"{name}.loss.estimator other than 'zero' with {name}.weight above 0" for name in names)
        yield (
            f"no token has a loss with rollouts = {objective.rollouts!r}, partition.rule = {objective.partition.rule!r} "
            f"and schedule.kind = {objective.schedule.kind!r}: set {', or '.join(ways)}"
        )
    if objective.token_weights and not students:
        yield "token_weights are for the student's tokens, and rollouts = 'teacher' has none: leave token_weights out"
    losses = [getattr(objective, name).loss for name in learning if name != "guidance"]
    looks = any(loss.estimator.startswith("topk") for loss in losses) or any(
        (isinstance(loss, K1) and loss.baseline == "kl") for loss in losses
    )
    looks = looks or any(weight.kind in TOPK_WEIGHTS for weight in objective.token_weights)
    if objective.alternatives == "student" and not looks:
        yield "alternatives = 'student' are looked at by no part of this objective: leave alternatives out"
    is_weighed = objective.partition.rule in (*TOKEN_RULES, "reward") or any(
        isinstance(loss, K1 | FixedAdvantage | NegativeLogLikelihood) for loss in losses
    )
    if objective.importance.clip is not None and not (losses and is_weighed):
        yield (
            "importance.clip weighs terms that depend on which tokens were drawn (k1, or a partition.rule that looks at "
            "them), and there are none here: leave importance.clip out"
        )


def _regions_with_tokens(objective: Objective) -> list[str]:
    students = objective.rollouts != "teacher"
    regions = {
        "trust": students and objective.partition.rule != "none",
        "outlier": students and objective.partition.rule != "all",
        "guidance": objective.schedule.kind != "none",
    }
    return [name for name, has_tokens in regions.items() if has_tokens]


def learning_regions(objective: Objective) -> list[str]:
    """Names of the regions that have tokens and a loss on them."""
    return [name for name in _regions_with_tokens(objective) if _learns(getattr(objective, name))]


def depends_on_draw(loss: Estimator) -> bool:
    """True if an estimator looks at the token that was drawn."""
    if isinstance(loss, TopkReverseKL):
        return loss.sample_corrected
    return isinstance(loss, K1 | FixedAdvantage)


def _learns(region: Region) -> bool:
    return region.loss.estimator != "zero" and region.weight > 0
