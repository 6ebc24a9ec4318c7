"""Demands of an objective on teacher, student and reference model: nothing else is fetched or computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.pipeline.objectives.objective import (
    K1,
    Estimator,
    FixedAdvantage,
    Objective,
    TopkForwardKL,
    TopkReverseKL,
    entropy_part,
    learning_regions,
    policy_gradients,
)
from tropd.pipeline.objectives.token_weight_specs import (
    DIVERGENCE_WEIGHTS,
    STUDENT_PASS_WEIGHTS,
    TOPK_WEIGHTS,
)


@dataclass(frozen=True)
class TeacherNeeds:
    """An objective's demands on the teacher for the student's tokens; nothing else is fetched."""

    token_logprobs: bool
    """The teacher's log-prob of each student token."""
    topk: Literal["none", "outliers", "all"]
    """On which student tokens alternatives are needed."""
    k: int
    """How many (0 if none)."""
    entropy: bool
    """The teacher's full-vocabulary entropy of each student token."""
    cached_topk: bool
    """Top-k of prefix tokens, from the cache (never from the service)."""
    chosen: int = 0
    """Ids per student token that the student chooses, and whose log-probs it is asked for (0: none)."""
    overlap: bool = False
    """The share of these that are among as many likeliest ids of its own."""

    @property
    def beyond_vllm(self) -> bool:
        """True if a teacher in vLLM does not give them: entropies, and log-probs of ids that the student chose."""
        return self.entropy or self.chosen > 0


def needed_data(objective: Objective) -> tuple[str, ...]:
    """Folders that an objective's data stages fill before training, in the order of the stages.

    Prefixes are needed where training starts from them, their scores where it imitates their alternatives, stored
    rollouts and their scores where the student does not write while it trains.
    """
    scores = teacher_needs(objective).cached_topk
    found = ["prefixes"] if scores or objective.schedule.kind != "none" else []
    found += ["scores"] if scores else []
    found += ["rollouts", "rollout-scores"] if objective.rollouts == "stored" else []
    return tuple(found)


def teacher_needs(objective: Objective) -> TeacherNeeds:
    """Derive the needs from the parts of an objective."""
    cached_topk = objective.guidance.loss.estimator == "topk_fkl"
    if objective.rollouts == "teacher":
        return TeacherNeeds(token_logprobs=False, topk="none", k=0, entropy=False, cached_topk=cached_topk)
    rule = objective.partition.rule
    outliers = rule != "all" and needs_topk(objective.outlier.loss)
    everywhere = (
        any(weight.kind in TOPK_WEIGHTS for weight in objective.token_weights)
        or (rule != "none" and needs_topk(objective.trust.loss))
        # Which rows are right is known to the trainer alone.
        or (rule in ("none", "reward") and outliers)
    )
    topk: Literal["none", "outliers", "all"] = "all" if everywhere else ("outliers" if outliers else "none")
    # The student chooses before it is known which tokens are outliers.
    chosen = objective.k if topk != "none" and objective.alternatives == "student" else 0
    topk = "none" if chosen else topk
    return TeacherNeeds(
        token_logprobs=not rewards_only(objective),
        topk=topk,
        k=0 if topk == "none" else objective.k,
        entropy=bool(entropy_part(objective)),
        cached_topk=cached_topk,
        chosen=chosen,
        overlap=chosen > 0 and any(weight.kind == "overlap_drift" for weight in objective.token_weights),
    )


def rewards_only(objective: Objective) -> bool:
    """True if nothing in the loss depends on the teacher: rewards are all that is learned from."""
    return (
        _group_rewards_alone(objective)
        and objective.partition.rule == "all"
        and bool(policy_gradients(objective))
        and all(weight.kind == "student_entropy_top" for weight in objective.token_weights)
    )


def learns_by_comparison_alone(objective: Objective) -> bool:
    """True if every loss is K1 whose only advantage is a reward's over the others of its group: 0 in a group of one."""
    return _group_rewards_alone(objective) and all(
        isinstance(getattr(objective, name).loss, K1) for name in learning_regions(objective)
    )


def _group_rewards_alone(objective: Objective) -> bool:
    """True if K1's advantages are those of groups of rewards, without the teacher's part."""
    term = objective.reward
    return term is not None and term.kind == "group" and term.distillation == 0


def needs_reference(objective: Objective) -> bool:
    """True if a part of an objective works on a reference model's log-probs: those of the student as it was."""
    losses = (objective.trust.loss, objective.outlier.loss)
    return any(isinstance(loss, K1) and loss.reward_scale != 1.0 for loss in losses)


def needs_student_pass(objective: Objective) -> bool:
    """True if a part of an objective works on the student's distributions at all tokens of the step at once."""
    losses = (objective.trust.loss, objective.outlier.loss)
    return any(weight.kind in STUDENT_PASS_WEIGHTS for weight in objective.token_weights) or any(
        isinstance(loss, FixedAdvantage) and loss.by_entropy > 0 for loss in losses
    )


def needs_student_tail(objective: Objective) -> bool:
    """True if a part of an objective works on the student's mass outside the alternatives."""
    losses = (objective.trust.loss, objective.outlier.loss, objective.guidance.loss)
    return any(_has_tail(loss) for loss in losses) or any(
        weight.kind in DIVERGENCE_WEIGHTS for weight in objective.token_weights
    )


def _has_tail(loss: Estimator) -> bool:
    if isinstance(loss, TopkForwardKL | TopkReverseKL):
        return loss.support == "tail"
    return loss.estimator in ("topk_mix", "topk_jsd") or (isinstance(loss, K1) and loss.baseline == "kl")


def needs_topk(loss: Estimator) -> bool:
    """True if an estimator works on alternatives."""
    return loss.estimator in ("topk_fkl", "topk_rkl", "topk_mix", "topk_jsd") or (
        isinstance(loss, K1) and loss.baseline == "kl"
    )


def needs_drawn(objective: Objective) -> bool:
    """True if a part of an objective asks whether the drawn token is among the alternatives."""
    losses = (objective.trust.loss, objective.outlier.loss)
    return any(isinstance(loss, TopkReverseKL) and loss.sample_corrected for loss in losses)
