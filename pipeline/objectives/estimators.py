"""Per-token losses: pure functions of log-probs, each tested against the closed form.

Legend: T tokens · M tokens that have alternatives · A = Σ counts alternatives of all M tokens, concatenated.
Log-probs are natural, from full softmaxes; student log-probs carry gradient, everything else is data.
Inputs may be float32 or float64; results have the student's dtype. Half precision is not accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.pipeline.objectives.objective import Support

LOGPROB_FLOOR = -100.0
"""Teacher log-probs below this (-inf included: a token that the teacher excludes) count as this, so that an
advantage stays finite. e^-100 is far below float32's resolution of a probability."""

TAIL_FLOOR = 1e-7
"""Smallest tail mass of the teacher in a logarithm: about the resolution of 1 - Σp in float32, which is how it is made.
The student's is summed over the tail itself, and has no floor."""


@dataclass(frozen=True)
class Alternatives:
    """Ragged alternatives of M tokens: the teacher's and the student's log-probs of the same ids, whoever chose them."""

    teacher_logprobs: Tensor
    """``[A]``."""
    student_logprobs: Tensor
    """``[A]``, with gradient."""
    counts: Tensor
    """``[M]`` int64."""
    teacher_tail: Tensor
    """``[M]`` log of the teacher's mass outside its alternatives; -inf if none."""
    student_tail: Tensor | None = None
    """``[M]`` log of the student's mass outside them, with gradient; -inf where no id is outside. None where no loss of
    the objective has a tail bucket."""
    holds_drawn: Tensor | None = None
    """``[M]`` bool: the drawn token is among the ids. None where no loss of the objective asks."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``[A]`` values per token to ``[M]``; 0 for a token without alternatives."""
        if len(self.counts) == 0:
            return values.new_zeros(0) + values.sum()
        total: Tensor = torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True)
        return total

    def spread(self, values: Tensor) -> Tensor:
        """``[A]`` the value ``[M]`` of the token that each alternative belongs to."""
        return torch.repeat_interleave(values, self.counts, output_size=len(self.teacher_logprobs))

    def logsumexp(self, values: Tensor) -> Tensor:
        """``[M]`` log of the sum per token of exp of ``[A]`` finite values."""
        if len(self.counts) == 0:
            return self.sum(values)
        largest: Tensor = torch.segment_reduce(values.detach(), "max", lengths=self.counts, unsafe=True)
        sums = self.sum((values - self.spread(largest)).exp())
        return torch.where(self.counts > 0, largest + sums.clamp(min=1e-30).log(), torch.zeros_like(sums))


def log_ratio(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """A = log π_T - log π_S per token, detached, with the teacher's log-prob floored at LOGPROB_FLOOR."""
    return (teacher_logprobs.clamp(min=LOGPROB_FLOOR) - student_logprobs).detach()


def k1_policy_gradient(
    student_logprobs: Tensor, advantages: Tensor, importance: Tensor | None = None
) -> Tensor:
    """``[T]`` -w·sg[A]·log π_S(x): with A = log π_T - log π_S, its expected gradient is ∇KL(π_S‖π_T).

    Args:
        student_logprobs: ``[T]`` of the sampled tokens, with gradient.
        advantages: ``[T]``; gradient through them is cut.
        importance: ``[T]`` weight min(π_θ/μ, c), detached; 1 if None.
    """
    weight = advantages.detach() if importance is None else advantages.detach() * importance.detach()
    return -weight * student_logprobs


def negative_log_likelihood(student_logprobs: Tensor) -> Tensor:
    """``[T]`` -log π_S(x): on tokens that the teacher sampled, the one-sample forward KL up to a constant."""
    return -student_logprobs


def topk_forward_kl(alternatives: Alternatives, support: Support, entry_clip: float | None = None) -> Tensor:
    """``[M]`` Σ_v π_T(v)·(log π_T(v) - log π_S(v)) over the teacher's alternatives.

    ``truncated``: raw probabilities; may be negative, is no KL (arXiv 2606.01249 as written).
    ``tail``: one more bucket with the remaining mass of both sides: the KL of two (k+1)-way distributions,
    ≥ 0 and a lower bound of the full forward KL.
    ``renormalized``: the teacher's probabilities divided by their sum (EOPD, arXiv 2603.07079).
    ``entry_clip``: each id's term lies in [0, clip], without gradient at the ends (the code of OPSD and ReNIO).
    """
    teacher = alternatives.teacher_logprobs
    student = alternatives.student_logprobs
    if support == "renormalized":
        mass = alternatives.sum(teacher.exp())
        # A token without alternatives has mass 0 and nothing to divide.
        logs = mass.clamp(min=1e-30).log()
        # With the size, a GPU need not be waited for.
        teacher = teacher - logs.repeat_interleave(alternatives.counts, output_size=len(teacher))
    terms = _weighted_difference(teacher, teacher, student)
    total = alternatives.sum(terms if entry_clip is None else terms.clamp(0.0, entry_clip))
    if support == "tail":
        # Without an id outside no bucket exists, whatever rounding has left of the teacher's mass.
        tail = student_tail(alternatives)
        nothing = torch.isneginf(tail)
        teacher_tail = alternatives.teacher_tail.masked_fill(nothing, -torch.inf)
        total = total + _weighted_difference(teacher_tail, teacher_tail, tail.masked_fill(nothing, 0.0))
    return total


def topk_reverse_kl(
    alternatives: Alternatives, support: Support = "tail", *, stop_gradient: bool = False
) -> Tensor:
    """``[M]`` Σ_v π_S(v)·(log π_S(v) - log π_T(v)) over the alternatives, whoever chose them.

    ``tail``: one more bucket with the remaining mass of both sides, KL(π_S‖π_T) of two (k+1)-way distributions.
    ``truncated``: raw probabilities; no KL. Its gradient Σ ∇π_S·(log-ratio + 1) is biased, since Σ ∇π_S over a part of
    the vocabulary is not 0; with ``stop_gradient`` on log π_S the + 1 is gone (arXiv 2605.11182).
    ``renormalized``: both sides divided by their sums over the alternatives (arXiv 2603.25562).
    """
    student = alternatives.student_logprobs
    teacher = alternatives.teacher_logprobs.clamp(min=LOGPROB_FLOOR)
    if support == "renormalized":
        student = student - alternatives.spread(alternatives.logsumexp(student))
        teacher = teacher - alternatives.spread(alternatives.logsumexp(teacher))
    inside = alternatives.sum(student.exp() * ((student.detach() if stop_gradient else student) - teacher))
    if support != "tail":
        return inside
    tail = student_tail(alternatives)
    nothing = torch.isneginf(tail)
    tail = tail.masked_fill(nothing, 0.0)
    outside = tail.exp() * (tail - _floored_tail(alternatives.teacher_tail))
    return inside + outside.masked_fill(nothing, 0.0)


def sample_correction(
    alternatives: Alternatives, student_logprobs: Tensor, teacher_logprobs: Tensor
) -> Tensor:
    """``[M]`` 1[x ∉ ids]·π_S(x)/sg[π_S(x)]·sg[log(π_S(x)/tail_S) - log(π_T(x)/tail_T)] of the drawn tokens x.

    Its expectation over x ~ π_S is the gradient that a tail bucket lacks: added to ``topk_reverse_kl`` with tail, the
    expected gradient is that of the full KL(π_S‖π_T) (arXiv 2608.14728).

    Args:
        student_logprobs: ``[M]`` of the drawn tokens, with gradient.
        teacher_logprobs: ``[M]`` of the same.

    Raises:
        ValueError: whether x is among the ids was not computed.
    """
    if alternatives.holds_drawn is None:
        raise ValueError("this estimator needs to know whether the drawn token is among the alternatives")
    own = log_ratio(teacher_logprobs, student_logprobs)
    tail = student_tail(alternatives).detach()
    outside = ~alternatives.holds_drawn & ~torch.isneginf(tail)
    difference = (tail - _floored_tail(alternatives.teacher_tail) + own).neg()
    kept = torch.where(outside, difference, torch.zeros_like(difference))
    return kept * (student_logprobs - student_logprobs.detach()).exp()


def topk_mixture(alternatives: Alternatives, reverse: float) -> Tensor:
    """``[M]`` λ·KL(π_S‖π_T) + (1-λ)·KL(π_T‖π_S) of the (k+1)-way distributions, λ = ``reverse``."""
    parts = []
    if reverse > 0.0:
        parts.append(reverse * topk_reverse_kl(alternatives))
    if reverse < 1.0:
        parts.append((1.0 - reverse) * topk_forward_kl(alternatives, "tail"))
    return torch.stack(parts).sum(dim=0)


def topk_jensen_shannon(alternatives: Alternatives, beta: float) -> Tensor:
    """``[M]`` β·KL(π_T‖m) + (1-β)·KL(π_S‖m), m = β·π_T + (1-β)·π_S, on the (k+1)-way distributions (GKD)."""

    def divergence(teacher: Tensor, student: Tensor) -> Tensor:
        t, s = teacher.exp(), student.exp()
        mixture = (beta * t + (1 - beta) * s).clamp(min=1e-30).log()
        return beta * _weighted_difference(teacher, teacher, mixture) + (1 - beta) * s * (student - mixture)

    inside = alternatives.sum(divergence(alternatives.teacher_logprobs, alternatives.student_logprobs))
    tail = student_tail(alternatives)
    nothing = torch.isneginf(tail)
    outside = divergence(_floored_tail(alternatives.teacher_tail), tail.masked_fill(nothing, 0.0))
    return inside + outside.masked_fill(nothing, 0.0)


def student_tail(alternatives: Alternatives) -> Tensor:
    """``[M]`` log of the student's mass outside the alternatives.

    Raises:
        ValueError: it was not computed.
    """
    if alternatives.student_tail is None:
        raise ValueError("this estimator needs the student's mass outside the alternatives")
    return alternatives.student_tail


def _floored_tail(tail: Tensor) -> Tensor:
    return tail.clamp(min=float(torch.log(torch.tensor(TAIL_FLOOR, dtype=torch.float64))))


def _weighted_difference(weight_logprobs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """exp(weight)·(left - right), and 0 (also in the gradient) where the weight is 0 and ``left`` is -inf."""
    empty = torch.isneginf(weight_logprobs)
    difference = torch.where(empty, torch.zeros_like(right), left.masked_fill(empty, 0.0) - right)
    return weight_logprobs.exp() * difference


# ------------------------------------------------------------------------- transforms of the advantage


def proximal_advantage(advantages: Tensor, alpha: float) -> Tensor:
    """log(α·e^A + 1 - α): the log-ratio to the proximal teacher α·π_T + (1-α)·π_S (TOP-D); ≥ log(1-α)."""
    if alpha == 1.0:
        return advantages
    constant = torch.log1p(torch.tensor(-alpha, dtype=torch.float64)).to(advantages)
    return torch.logaddexp(
        advantages + torch.log(torch.tensor(alpha, dtype=torch.float64)).to(advantages), constant
    )


def scaled_advantage(
    teacher_logprobs: Tensor, student_logprobs: Tensor, reference_logprobs: Tensor, scale: float
) -> Tensor:
    """λ(log π_T - log π_ref) - (log π_S - log π_ref), detached (G-OPD/ExOPD, arXiv 2602.12125)."""
    teacher = teacher_logprobs.clamp(min=LOGPROB_FLOOR)
    reference = reference_logprobs.clamp(min=LOGPROB_FLOOR)
    return (scale * (teacher - reference) - (student_logprobs - reference)).detach()


def importance_weight(student_logprobs: Tensor, mu_logprobs: Tensor, clip: float) -> Tensor:
    """``[T]`` min(π_θ/μ, c), detached: corrects for tokens that were drawn from μ, not from the student itself."""
    return (student_logprobs - mu_logprobs).detach().exp().clamp(max=clip)
