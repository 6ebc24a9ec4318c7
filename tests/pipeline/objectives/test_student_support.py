"""Divergences over the student's own top k against loops over an enumerated vocabulary, float64: loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.objectives.estimators import (
    LOGPROB_FLOOR,
    Alternatives,
    sample_correction,
    topk_forward_kl,
    topk_mixture,
    topk_reverse_kl,
)
from tropd.pipeline.objectives.objective import Support

EXACT = 1e-10
V = 7
seeds = st.integers(0, 2**31 - 1)


def step(seed: int, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits ``[tokens, V]`` (with gradient) and teacher log-probs, float64."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, V, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(tokens, V, generator=generator, dtype=torch.float64)
    return student, torch.log_softmax(2 * teacher, -1)


def chosen(student: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(range(V), key=lambda v: -float(row[v]))[:k] for row in student]


def alternatives(
    student: torch.Tensor, teacher: torch.Tensor, k: int, drawn: list[int] | None = None
) -> Alternatives:
    """The student's top k of each token, as the trainer has them."""
    logprobs = torch.log_softmax(student, -1)
    ids = torch.tensor(chosen(student, k))
    outside = torch.ones(teacher.shape, dtype=torch.bool).scatter(-1, ids, False)

    def tail(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~outside, -math.inf).logsumexp(-1)

    held = None if drawn is None else torch.tensor([d in ids[t] for t, d in enumerate(drawn)])
    return Alternatives(
        teacher.gather(-1, ids).reshape(-1),
        logprobs.gather(-1, ids).reshape(-1),
        torch.full((len(student),), k),
        tail(teacher),
        tail(logprobs),
        held,
    )


def naive(
    student: torch.Tensor, teacher: torch.Tensor, k: int, support: Support, *, frozen: bool = False
) -> torch.Tensor:
    """The loss from its definition, token by token and id by id."""
    total = torch.zeros((), dtype=torch.float64)
    for t, ids in enumerate(chosen(student, k)):
        p = torch.softmax(student[t], -1)
        q = teacher[t].exp()
        mass_p, mass_q = sum(p[v] for v in ids), sum(q[v] for v in ids)
        for v in ids:
            own, theirs = (p[v] / mass_p, q[v] / mass_q) if support == "renormalized" else (p[v], q[v])
            log_own = own.log().detach() if frozen else own.log()
            total = total + own * (log_own - theirs.log())
        if support == "tail" and k < V:
            rest_p = sum(p[v] for v in range(V) if v not in ids)
            rest_q = sum(q[v] for v in range(V) if v not in ids)
            total = total + rest_p * (rest_p.log() - rest_q.log())
    return total


def full_reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(student, -1)
    return (logprobs.exp() * (logprobs - teacher)).sum()


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return found


def check_equal(found: torch.Tensor, exact: torch.Tensor, student: torch.Tensor) -> None:
    assert abs(float((found - exact).detach())) < EXACT
    assert (gradient(found, student) - gradient(exact, student)).abs().max() < EXACT


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, V), st.sampled_from(["tail", "truncated", "renormalized"]))
def test_the_reverse_kl_over_the_students_top_k(seed: int, k: int, support: Support) -> None:
    student, teacher = step(seed)
    found = topk_reverse_kl(alternatives(student, teacher, k), support).sum()
    check_equal(found, naive(student, teacher, k, support), student)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, V))
def test_with_the_gradient_stopped_it_is_that_of_the_log_ratio_alone(seed: int, k: int) -> None:
    student, teacher = step(seed)
    found = topk_reverse_kl(alternatives(student, teacher, k), "truncated", stop_gradient=True).sum()
    check_equal(found, naive(student, teacher, k, "truncated", frozen=True), student)
    by_hand = torch.zeros_like(student)
    for t, ids in enumerate(chosen(student, k)):
        p = torch.softmax(student[t], -1)
        for v in ids:
            by_hand += gradient(p[v], student) * float((p[v].log() - teacher[t, v]).detach())
    assert (gradient(found, student) - by_hand).abs().max() < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_at_k_the_whole_vocabulary_every_form_is_the_exact_reverse_kl(seed: int) -> None:
    student, teacher = step(seed)
    whole, exact = alternatives(student, teacher, V), full_reverse_kl(student, teacher)
    for support in ("tail", "truncated", "renormalized"):
        check_equal(topk_reverse_kl(whole, support).sum(), exact, student)
    check_equal(topk_reverse_kl(whole, "truncated", stop_gradient=True).sum(), exact, student)
    drawn = alternatives(student, teacher, V, drawn=[0, 1, 2])
    correction = sample_correction(drawn, torch.log_softmax(student, -1)[:, 0], teacher[:, 0])
    assert not correction.any()


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, V - 1))
def test_with_the_tail_it_is_between_zero_and_the_full_reverse_kl(seed: int, k: int) -> None:
    student, teacher = step(seed, tokens=1)
    found = float(topk_reverse_kl(alternatives(student, teacher, k)).detach())
    assert -EXACT < found < float(full_reverse_kl(student, teacher).detach()) + EXACT


@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_goes_from_the_forward_to_the_reverse_kl(seed: int, k: int) -> None:
    student, teacher = step(seed)
    both = alternatives(student, teacher, k)
    forward, reverse = topk_forward_kl(both, "tail").sum(), topk_reverse_kl(both).sum()
    check_equal(topk_mixture(both, 0.0).sum(), forward, student)
    check_equal(topk_mixture(both, 1.0).sum(), reverse, student)
    check_equal(topk_mixture(both, 0.3).sum(), 0.3 * reverse + 0.7 * forward, student)
    if k == V:
        p, q = torch.softmax(student, -1), teacher.exp()
        exact = (0.3 * p * (p.log() - teacher) + 0.7 * q * (teacher - p.log())).sum()
        check_equal(topk_mixture(both, 0.3).sum(), exact, student)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_with_the_drawn_token_is_that_of_the_full_reverse_kl(seed: int, k: int) -> None:
    student, teacher = step(seed, tokens=1)
    expected = torch.zeros_like(student)
    for v in range(V):
        one = alternatives(student, teacher, k, drawn=[v])
        logprobs = torch.log_softmax(student, -1)[:, v]
        loss = (topk_reverse_kl(one) + sample_correction(one, logprobs, teacher[:, v])).sum()
        expected += float(logprobs.exp().detach()) * gradient(loss, student)
    exact = gradient(full_reverse_kl(student, teacher), student)
    assert (expected - exact).abs().max() < EXACT
    if k < 6:  # with one id outside, bucket and id are the same
        without = gradient(topk_reverse_kl(alternatives(student, teacher, k)).sum(), student)
        assert (without - exact).abs().max() > 1e-3


def test_ids_that_the_teacher_excludes_are_floored_and_no_nan() -> None:
    student, teacher = step(0, tokens=1)
    teacher = torch.full_like(teacher, -math.inf)
    both = alternatives(student, teacher, 3)
    for support in ("tail", "truncated", "renormalized"):
        loss = topk_reverse_kl(both, support).sum()
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient(loss, student)).all()
    assert float(topk_reverse_kl(both, "truncated").detach()) < -LOGPROB_FLOOR


def test_tokens_without_alternatives_add_nothing() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    empty = Alternatives(
        none, none, torch.zeros(2, dtype=torch.long), torch.zeros(2), torch.full((2,), -math.inf)
    )
    assert topk_reverse_kl(empty, "renormalized").tolist() == [0.0, 0.0]
    assert topk_reverse_kl(
        Alternatives(none, none, torch.zeros(0, dtype=torch.long), none), "truncated"
    ).shape == (0,)
