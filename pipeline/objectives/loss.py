"""The loss of a step: a plan of coefficients for the whole step, then the loss of each micro-batch.

The plan (numpy, no gradient) folds region weights, token weights and the reduction's denominator into one
coefficient per token and region. The loss of a micro-batch is then Σ coefficient · estimator, and the sum
over micro-batches is the loss of the step, however it was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.objectives.estimators import (
    LOGPROB_FLOOR,
    Alternatives,
    importance_weight,
    k1_policy_gradient,
    log_ratio,
    negative_log_likelihood,
    proximal_advantage,
    sample_correction,
    scaled_advantage,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_mixture,
    topk_reverse_kl,
)
from tropd.pipeline.objectives.objective import (
    K1,
    Estimator,
    FixedAdvantage,
    NegativeLogLikelihood,
    Objective,
    TopkReverseKL,
    policy_gradients,
)
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.objectives.partition_specs import TOKEN_RULES
from tropd.pipeline.objectives.rewards.advantages import group_advantages, margin_shifts, process_advantages
from tropd.pipeline.objectives.token_weights import (
    TokenStatistics,
    mean_of_later,
    standardize_by_group,
    token_weight,
)
from tropd.storage.arrays import Floats64, Ints


@dataclass(frozen=True)
class StepPlan:
    """Coefficients of a step: T student tokens and G guidance tokens, over all rows."""

    trust: Floats64
    """``[T]``."""
    outlier: Floats64
    """``[T]``."""
    guidance: Floats64
    """``[G]``."""
    trust_advantages: Floats64 | None
    """``[T]`` final advantages of K1 on trusted tokens, where they depend on more than their own token; None if not."""
    outlier_advantages: Floats64 | None
    """``[T]`` the same of K1 on outliers."""
    reward_advantages: Floats64 | None = None
    """``[T]`` added to the advantages of K1 on every student token, where the objective takes rewards."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, flat: its t student tokens and g guidance tokens."""

    student_logprobs: Tensor
    """``[t]`` log π_S of the student's tokens, with gradient."""
    teacher_logprobs: Tensor
    """``[t]`` log π_T of the same tokens."""
    mu_logprobs: Tensor
    """``[t]`` log μ: of the distribution that they were drawn from."""
    trust: Tensor
    """``[t]`` coefficients from the plan; likewise the next two."""
    outlier: Tensor
    guidance: Tensor
    """``[g]``."""
    trust_used: Tensor
    """``[u]`` the tokens whose coefficient is not 0, rising: indices, since a GPU would be waited for to count a mask."""
    outlier_used: Tensor
    """``[u]`` likewise."""
    guidance_logprobs: Tensor
    """``[g]`` log π_S of the teacher's prefix tokens, with gradient."""
    trust_advantages: Tensor | None = None
    """``[t]`` from the plan; likewise the next one."""
    outlier_advantages: Tensor | None = None
    reward_advantages: Tensor | None = None
    """``[t]`` from the plan."""
    reference_logprobs: Tensor | None = None
    """``[t]`` log π_ref, where the objective scales rewards."""
    topk_index: Tensor | None = None
    """``[m]`` which of the t tokens have alternatives."""
    topk: Alternatives | None = None
    """The alternatives of those m tokens."""
    guidance_topk: Alternatives | None = None
    """Cached alternatives of all g guidance tokens."""


def plan_step(
    objective: Objective,
    regions: Regions,
    statistics: TokenStatistics,
    *,
    groups: Ints,
    guidance_rows: Ints,
    progress: float,
) -> StepPlan:
    """Coefficients of every token of a step.

    Args:
        regions: partition weights ``[T]``.
        statistics: ``[T]`` per student token.
        groups: ``[T]`` number of the prompt that each token answers.
        guidance_rows: ``[G]`` row of each prefix token (same numbering as ``statistics.rows``).
        progress: share of the training steps done, in [0, 1).
    """
    weight = np.ones(len(statistics.rows))
    for spec in objective.token_weights:
        weight = weight * token_weight(spec, statistics, progress)
    trust = regions.trust.astype(np.float64) * weight
    outlier = regions.outlier.astype(np.float64) * weight
    guidance = np.full(len(guidance_rows), 1.0 if objective.guides else 0.0)
    if objective.reduction == "region_mean":
        trust, outlier, guidance = _mean(trust), _mean(outlier), _mean(guidance)
    elif objective.reduction == "sequence_mean":
        supervised_rows = np.concatenate([statistics.rows, guidance_rows[guidance > 0]])
        lengths = np.bincount(supervised_rows)
        scale = 1.0 / np.maximum(lengths * max(1, int(np.count_nonzero(lengths))), 1)
        trust, outlier = trust * scale[statistics.rows], outlier * scale[statistics.rows]
        # A guidance token outside the loss may lie in a row that has no supervised token at all.
        guidance = (
            np.where(guidance > 0, scale[np.minimum(guidance_rows, len(scale) - 1)], 0.0)
            if len(scale)
            else guidance
        )
    else:
        students = float(weight.sum()) if objective.reduction == "weight_mean" else float(len(weight))
        total = max(students + float(guidance.sum()), 1e-12)
        trust, outlier, guidance = trust / total, outlier / total, guidance / total
    return StepPlan(
        trust=trust * objective.trust.weight,
        outlier=outlier * objective.outlier.weight,
        guidance=guidance * objective.guidance.weight,
        trust_advantages=_planned_advantages(objective.trust.loss, statistics, groups, weight),
        outlier_advantages=_planned_advantages(objective.outlier.loss, statistics, groups, weight),
        reward_advantages=_reward_advantages(objective, statistics, groups),
    )


def _mean(weights: Floats64) -> Floats64:
    total = weights.sum()
    return weights / total if total > 0 else weights


def _planned_advantages(
    loss: Estimator, statistics: TokenStatistics, groups: Ints, weight: Floats64
) -> Floats64 | None:
    """``[T]`` over all student tokens of the step, whatever region they are in; ``weight`` ``[T]`` says which count."""
    if isinstance(loss, FixedAdvantage):
        return fixed_advantages(loss, statistics, weight)
    if not isinstance(loss, K1) or not (loss.returns or loss.standardize):
        return None
    return _final_advantages(loss, statistics, groups)


def _final_advantages(loss: K1, statistics: TokenStatistics, groups: Ints) -> Floats64:
    """``[T]`` after every transform of the specification but the baseline."""
    rewards = statistics.advantages
    if loss.reward_scale != 1.0:
        if statistics.gain is None:
            raise ValueError("k1 with reward_scale needs the reference model's log-probs")
        rewards = rewards + (loss.reward_scale - 1.0) * statistics.gain
    if loss.proximal is not None:
        rewards = proximal_advantage(torch.from_numpy(rewards), loss.proximal).numpy()
    if loss.returns:
        rewards = rewards + mean_of_later(rewards, statistics.rows)
    if loss.standardize:
        rewards = standardize_by_group(rewards, groups)
    return rewards if loss.floor is None else np.maximum(rewards, loss.floor)


def fixed_advantages(loss: FixedAdvantage, statistics: TokenStatistics, weight: Floats64) -> Floats64:
    """``[T]`` A - b·(H - min H)/(max H - min H) over the tokens with weight, r = 1 where all H are one (OPSA's code)."""
    advantages = np.full(len(weight), loss.advantage)
    counts = weight != 0
    if not loss.by_entropy or not counts.any():
        return advantages
    if statistics.student_entropy is None:
        raise ValueError("fixed advantages by entropy need the student's entropy of each token")
    entropy = statistics.student_entropy[counts]
    span = entropy.max() - entropy.min()
    rank = (entropy - entropy.min()) / span if span > 0 else np.ones_like(entropy)
    advantages[counts] -= loss.by_entropy * rank
    return advantages


def check_alternatives(objective: Objective, plan: StepPlan, index: Ints) -> None:
    """Check that all tokens whose loss needs the teacher's top-k have it: those of ``index`` ``[M]``.

    Raises:
        ValueError: one has not.
    """
    for region, coefficients in ((objective.trust, plan.trust), (objective.outlier, plan.outlier)):
        if region.loss.estimator.startswith("topk_"):
            missing = np.count_nonzero(coefficients) - np.count_nonzero(coefficients[index])
            if missing:
                raise ValueError(f"{missing} tokens need the teacher's top-k, but have none")


def _reward_advantages(objective: Objective, statistics: TokenStatistics, groups: Ints) -> Floats64 | None:
    """``[T]`` the part of the rewards; None where the objective takes none."""
    term, rewards = objective.reward, statistics.rewards
    if term is None or (term.kind == "group" and term.weight == 0):
        return None
    if rewards is None:
        raise ValueError("this objective needs the rewards of the rows")
    if term.kind == "margin":
        first = next(iter(policy_gradients(objective).values()))
        advantages = _final_advantages(first, statistics, groups)
        return margin_shifts(advantages, statistics.rows, rewards, term.margin)[statistics.rows]
    if rewards.tokens is not None:
        return term.weight * process_advantages(
            rewards.tokens, statistics.rows, groups, standardize=term.standardize
        )
    advantages = group_advantages(rewards.rows, rewards.groups, standardize=term.standardize)
    return term.weight * advantages[statistics.rows]


def region_losses(objective: Objective, batch: TokenBatch) -> Mapping[str, Tensor]:
    """The loss of a micro-batch as scalars per region (``trust``, ``outlier``, ``guidance``); the loss is their sum."""
    trust, outlier = objective.trust.loss, objective.outlier.loss
    return {
        "trust": _student_losses(
            trust, objective, batch, batch.trust, batch.trust_used, batch.trust_advantages
        ),
        "outlier": _student_losses(
            outlier, objective, batch, batch.outlier, batch.outlier_used, batch.outlier_advantages
        ),
        "guidance": _guidance_loss(objective, batch),
    }


def _student_losses(
    loss: Estimator,
    objective: Objective,
    batch: TokenBatch,
    coefficients: Tensor,
    used: Tensor,
    planned: Tensor | None,
) -> Tensor:
    # Coefficient 0 must mean no contribution even where a loss is huge, so tokens are selected, not multiplied.
    zero = batch.student_logprobs.sum() * 0.0
    if loss.estimator == "zero":
        return zero
    if isinstance(loss, K1 | FixedAdvantage | NegativeLogLikelihood):
        importance = _importance(objective, batch)
        advantages = _advantages(loss, objective, batch, planned)
        values = k1_policy_gradient(
            batch.student_logprobs[used], advantages[used], None if importance is None else importance[used]
        )
        return (coefficients[used] * values).sum() + zero
    if batch.topk is None or batch.topk_index is None:
        if len(used):
            raise ValueError(
                f"estimator {loss.estimator!r} needs the teacher's top-k, which the batch does not have"
            )
        return zero
    weights = coefficients[batch.topk_index]
    values = _topk_loss(loss, batch.topk)
    importance = (
        _importance(objective, batch) if objective.partition.rule in (*TOKEN_RULES, "reward") else None
    )
    if isinstance(loss, TopkReverseKL) and loss.sample_corrected:
        values = values + _sample_correction(objective, batch, batch.topk, batch.topk_index)
    if importance is not None:
        # A divergence over the vocabulary does not depend on the drawn token; that it counts here does.
        values = values * importance[batch.topk_index]
    return (weights * torch.where(weights != 0, values, torch.zeros_like(values))).sum() + zero


def _advantages(
    loss: K1 | FixedAdvantage | NegativeLogLikelihood,
    objective: Objective,
    batch: TokenBatch,
    planned: Tensor | None,
) -> Tensor:
    """``[t]`` advantages of a policy gradient: the estimator's own, and the part of the rewards."""
    if isinstance(loss, NegativeLogLikelihood):  # of right answers, whose every token counts alike
        return torch.ones_like(batch.student_logprobs)
    term, rewards = objective.reward, batch.reward_advantages
    factor = term.distillation if term is not None and term.kind == "group" else 1.0
    if isinstance(loss, K1) and factor == 0 and rewards is not None:
        return rewards  # the teacher may not have been asked
    if planned is None and isinstance(loss, FixedAdvantage):
        raise ValueError("fixed advantages belong to the step's plan, and the batch has none")
    advantages = k1_advantages(loss, batch) if planned is None and isinstance(loss, K1) else planned
    assert advantages is not None
    if not isinstance(loss, K1):
        return advantages
    advantages = advantages if factor == 1 else factor * advantages
    return advantages if rewards is None else advantages + rewards


def _topk_loss(loss: Estimator, alternatives: Alternatives) -> Tensor:
    if loss.estimator == "topk_fkl":
        return topk_forward_kl(alternatives, loss.support, loss.entry_clip)
    if loss.estimator == "topk_rkl":
        return topk_reverse_kl(alternatives, loss.support, stop_gradient=loss.stop_gradient)
    if loss.estimator == "topk_mix":
        return topk_mixture(alternatives, loss.reverse)
    if loss.estimator == "topk_jsd":
        return topk_jensen_shannon(alternatives, loss.beta)
    raise ValueError(f"{loss.estimator!r} is not a top-k estimator")


def _sample_correction(
    objective: Objective, batch: TokenBatch, alternatives: Alternatives, index: Tensor
) -> Tensor:
    found = sample_correction(alternatives, batch.student_logprobs[index], batch.teacher_logprobs[index])
    weights = None if objective.partition.rule in TOKEN_RULES else _importance(objective, batch)
    return found if weights is None else found * weights[index]


def k1_advantages(loss: K1, batch: TokenBatch) -> Tensor:
    """``[t]`` advantages after every transform of the specification that looks at one token, detached."""
    student = batch.student_logprobs.detach()
    if loss.reward_scale != 1.0:
        if batch.reference_logprobs is None:
            raise ValueError("k1 with reward_scale needs the reference model's log-probs")
        advantages = scaled_advantage(
            batch.teacher_logprobs, student, batch.reference_logprobs, loss.reward_scale
        )
    else:
        advantages = log_ratio(batch.teacher_logprobs, student)
    if loss.proximal is not None:
        advantages = proximal_advantage(advantages, loss.proximal)
    if loss.baseline == "kl":
        if batch.topk is None or batch.topk_index is None:
            raise ValueError("k1 with baseline 'kl' needs the teacher's top-k on every token")
        divergence = torch.zeros_like(advantages)
        divergence[batch.topk_index] = topk_reverse_kl(batch.topk).detach()
        advantages = advantages + divergence
    return advantages if loss.floor is None else advantages.clamp(min=loss.floor)


def _importance(objective: Objective, batch: TokenBatch) -> Tensor | None:
    """``[t]`` weights of the tokens that were drawn, where the objective asks for them."""
    if objective.importance.clip is None:
        return None
    return importance_weight(batch.student_logprobs, batch.mu_logprobs, objective.importance.clip)


def _guidance_loss(objective: Objective, batch: TokenBatch) -> Tensor:
    loss = objective.guidance.loss
    zero = batch.guidance_logprobs.sum() * 0.0
    if loss.estimator == "nll":
        return (batch.guidance * negative_log_likelihood(batch.guidance_logprobs)).sum()
    if loss.estimator == "topk_fkl" and batch.guidance_topk is not None:
        return (
            batch.guidance * topk_forward_kl(batch.guidance_topk, loss.support, loss.entry_clip)
        ).sum() + zero
    return zero


def floored_log_ratio(
    teacher_logprobs: npt.NDArray[np.float32], student_logprobs: npt.NDArray[np.float32]
) -> Floats64:
    """``[T]`` log π_T - log π_S in float64, with the teacher's log-prob floored at LOGPROB_FLOOR."""
    return np.maximum(teacher_logprobs.astype(np.float64), LOGPROB_FLOOR) - student_logprobs.astype(
        np.float64
    )
