"""Every estimator against the closed form: a small vocabulary is enumerated in float64, autograd differentiates it.

The references here are written from the definitions, with loops; the fast path is never its own reference.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.pipeline.objectives.estimators import (
    TAIL_FLOOR,
    Alternatives,
    importance_weight,
    k1_policy_gradient,
    log_ratio,
    proximal_advantage,
    scaled_advantage,
    student_tail,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_reverse_kl,
)
from tropd.pipeline.objectives.objective import Support
from tropd.pipeline.objectives.partition import acceptance, partition_tokens
from tropd.pipeline.objectives.partition_specs import ExpectedPartition, SampledPartition
from tropd.storage.seeds import uniforms

EXACT = 1e-10
VOCABULARY = 7
seeds = st.integers(0, 2**31 - 1)


def distributions(seed: int, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits (with gradient) and teacher log-probs, float64."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.log_softmax(2 * torch.randn(vocabulary, generator=generator, dtype=torch.float64), -1)
    return student, teacher


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, logits)
    return found


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(student, -1)
    return sum((logprobs[v].exp() * (logprobs[v] - teacher[v]) for v in range(len(teacher))), torch.zeros(()))


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(student, -1)
    return sum((teacher[v].exp() * (teacher[v] - logprobs[v]) for v in range(len(teacher))), torch.zeros(()))


def alternatives(student: torch.Tensor, teacher: torch.Tensor, k: int) -> Alternatives:
    """One token's teacher top-k against the student."""
    values, ids = teacher.topk(k)
    rest = 1.0 - values.exp().sum()
    tail = rest.clamp(min=0).log() if k < len(teacher) else torch.tensor(-math.inf, dtype=torch.float64)
    logprobs = torch.log_softmax(student, -1)
    outside = torch.ones_like(teacher, dtype=torch.bool).index_fill(0, ids, False)
    # Of no number, logsumexp is -inf.
    own_tail = logprobs[outside].logsumexp(0) if outside.any() else torch.tensor(-math.inf).double()
    return Alternatives(values, logprobs[ids], torch.tensor([k]), tail.reshape(1), own_tail.reshape(1))


def expected_k1_gradient(student: torch.Tensor, teacher: torch.Tensor, baseline: float = 0.0) -> torch.Tensor:
    """Σ_x π_S(x)·∇(K1 loss of x), enumerated."""
    logprobs = torch.log_softmax(student, -1)
    total = torch.zeros_like(student)
    for token in range(len(teacher)):
        advantage = log_ratio(teacher[token], logprobs[token]) + baseline
        loss = k1_policy_gradient(logprobs[token], advantage)
        total += logprobs[token].exp().detach() * torch.autograd.grad(loss, student, retain_graph=True)[0]
    return total


@pytest.mark.parametrize("seed", range(5))
def test_expected_k1_gradient_is_the_gradient_of_the_reverse_kl(seed: int) -> None:
    student, teacher = distributions(seed)
    exact = gradient(reverse_kl(student, teacher), student)
    assert (expected_k1_gradient(student, teacher) - exact).abs().max() < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_a_baseline_leaves_the_expected_k1_gradient_unchanged(seed: int) -> None:
    student, teacher = distributions(seed)
    baseline = float(topk_reverse_kl(alternatives(student, teacher, 3)).detach())
    difference = expected_k1_gradient(student, teacher, baseline) - expected_k1_gradient(student, teacher)
    assert difference.abs().max() < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_baseline_with_the_whole_vocabulary_centres_the_advantage(seed: int) -> None:
    student, teacher = distributions(seed)
    logprobs = torch.log_softmax(student, -1).detach()
    baseline = topk_reverse_kl(alternatives(student, teacher, VOCABULARY)).detach()
    mean = (logprobs.exp() * (teacher - logprobs + baseline)).sum()
    assert abs(float(mean)) < 1e-5  # the tail bucket's floor is 1e-7


@pytest.mark.parametrize("seed", range(5))
def test_forward_kl_over_the_whole_vocabulary_is_the_full_forward_kl(seed: int) -> None:
    student, teacher = distributions(seed)
    exact = forward_kl(student, teacher)
    for support in ("truncated", "tail", "renormalized"):
        loss = topk_forward_kl(alternatives(student, teacher, VOCABULARY), support)[0]
        assert abs(float(loss - exact)) < EXACT
        assert (gradient(loss, student) - gradient(exact, student)).abs().max() < EXACT
        exact = forward_kl(student, teacher)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("support", ["truncated", "renormalized"])
def test_forward_kl_with_clipped_entries_sums_each_ids_term_within_the_bounds(
    seed: int, support: Support
) -> None:
    student, teacher = distributions(seed)
    logprobs = torch.log_softmax(student, -1)
    values, ids = teacher.topk(4)
    if support == "renormalized":
        values = values - values.exp().sum().log()
    exact = torch.zeros((), dtype=torch.float64)
    for value, v in zip(values, ids, strict=True):
        term = value.exp() * (value - logprobs[v])
        exact = exact + (term if 0 < float(term) < 0.05 else float(term) >= 0.05 and 0.05)
    loss = topk_forward_kl(alternatives(student, teacher, 4), support, 0.05)[0]
    assert abs(float(loss - exact)) < EXACT
    if exact.requires_grad:
        assert (gradient(loss, student) - gradient(exact, student)).abs().max() < EXACT


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, VOCABULARY - 1))
def test_forward_kl_with_tail_is_the_kl_of_the_bucketed_distributions(seed: int, k: int) -> None:
    student, teacher = distributions(seed)
    ids = teacher.topk(k).indices
    s = torch.log_softmax(student, -1).exp()[ids]
    t = teacher.exp()[ids]
    s, t = torch.cat([s, (1 - s.sum()).reshape(1)]), torch.cat([t, (1 - t.sum()).reshape(1)])
    exact = (t * (t.log() - s.log())).sum()
    loss = topk_forward_kl(alternatives(student, teacher, k), "tail")[0]
    assert abs(float(loss - exact)) < EXACT
    assert -EXACT <= float(loss) <= float(forward_kl(student, teacher)) + EXACT
    assert (gradient(loss, student) - gradient(exact, student)).abs().max() < EXACT


def test_truncated_forward_kl_can_be_negative_and_stays_so() -> None:
    teacher = torch.log(torch.tensor([0.25, 0.24, 0.2, 0.16, 0.15], dtype=torch.float64))
    student = torch.tensor([3.0, 3.0, -3.0, -3.0, -3.0], dtype=torch.float64).requires_grad_()
    loss = topk_forward_kl(alternatives(student, teacher, 2), "truncated")[0]
    assert float(loss) < 0
    assert gradient(loss, student).abs().max() > 0


@pytest.mark.parametrize("seed", range(3))
def test_renormalized_forward_kl_follows_its_definition(seed: int) -> None:
    student, teacher = distributions(seed)
    ids = teacher.topk(3).indices
    p = teacher.exp()[ids] / teacher.exp()[ids].sum()
    exact = (p * (p.log() - torch.log_softmax(student, -1)[ids])).sum()
    assert abs(float(topk_forward_kl(alternatives(student, teacher, 3), "renormalized")[0] - exact)) < EXACT


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, VOCABULARY - 1))
def test_reverse_kl_is_the_kl_of_the_bucketed_distributions(seed: int, k: int) -> None:
    student, teacher = distributions(seed)
    ids = teacher.topk(k).indices
    s, t = torch.log_softmax(student, -1).exp()[ids], teacher.exp()[ids]
    s, t = torch.cat([s, (1 - s.sum()).reshape(1)]), torch.cat([t, (1 - t.sum()).reshape(1)])
    exact = (s * (s.log() - t.log())).sum()
    loss = topk_reverse_kl(alternatives(student, teacher, k))[0]
    assert abs(float(loss - exact)) < EXACT
    assert float(loss) <= float(reverse_kl(student, teacher)) + EXACT


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_follows_its_definition_and_is_bounded(beta: float) -> None:
    student, teacher = distributions(3)
    ids = teacher.topk(3).indices
    s, t = torch.log_softmax(student, -1).exp()[ids], teacher.exp()[ids]
    s, t = torch.cat([s, (1 - s.sum()).reshape(1)]), torch.cat([t, (1 - t.sum()).reshape(1)])
    m = beta * t + (1 - beta) * s
    exact = beta * (t * (t / m).log()).sum() + (1 - beta) * (s * (s / m).log()).sum()
    loss = topk_jensen_shannon(alternatives(student, teacher, 3), beta)[0]
    assert abs(float(loss - exact)) < EXACT
    assert 0 <= float(loss) <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_identical_teacher_and_student_have_no_loss_and_no_gradient(k: int) -> None:
    student, _ = distributions(1)
    teacher = torch.log_softmax(student, -1).detach()
    for loss in (
        topk_forward_kl(alternatives(student, teacher, k), "tail")[0],
        topk_reverse_kl(alternatives(student, teacher, k))[0],
        topk_jensen_shannon(alternatives(student, teacher, k), 0.5)[0],
    ):
        assert abs(float(loss)) < 1e-6
        assert gradient(loss, student).abs().max() < 1e-6
    assert expected_k1_gradient(student, teacher).abs().max() < EXACT


def test_teacher_logprobs_of_minus_infinity_stay_finite() -> None:
    student = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    for k in (2, 3, 4):
        for loss in (
            *(
                topk_forward_kl(alternatives(student, teacher, k), s)[0]
                for s in ("truncated", "tail", "renormalized")
            ),
            topk_reverse_kl(alternatives(student, teacher, k))[0],
            topk_jensen_shannon(alternatives(student, teacher, k), 0.5)[0],
        ):
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient(loss, student)).all()
    advantage = log_ratio(torch.tensor([-math.inf]), torch.tensor([-1.0]))
    assert torch.isfinite(advantage).all()


def test_ragged_tokens_are_independent_of_each_other() -> None:
    student, teacher = distributions(5)
    one, three = alternatives(student, teacher, 1), alternatives(student, teacher, 3)
    joined = Alternatives(
        torch.cat([one.teacher_logprobs, three.teacher_logprobs]),
        torch.cat([one.student_logprobs, three.student_logprobs]),
        torch.tensor([1, 0, 3]),
        torch.cat([one.teacher_tail, torch.zeros(1, dtype=torch.float64), three.teacher_tail]),
        torch.cat([student_tail(one), torch.zeros(1, dtype=torch.float64), student_tail(three)]),
    )
    for function in (
        lambda a: topk_forward_kl(a, "tail"),
        topk_reverse_kl,
        lambda a: topk_jensen_shannon(a, 0.3),
    ):
        values = function(joined)
        assert abs(float(values[0] - function(one)[0])) < EXACT
        assert abs(float(values[2] - function(three)[0])) < EXACT
        # A token without alternatives has all of both sides' mass in the tail: nothing to learn.
        assert abs(float(values[1])) < EXACT


def test_no_tokens_give_an_empty_result_that_can_be_differentiated() -> None:
    student = torch.zeros(0, requires_grad=True)
    empty = Alternatives(torch.zeros(0), student, torch.zeros(0, dtype=torch.long), torch.zeros(0), student)
    for value in (topk_forward_kl(empty, "tail"), topk_reverse_kl(empty), topk_jensen_shannon(empty, 0.5)):
        assert value.shape == (0,)
        value.sum().backward()


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_expected_acceptance_is_one_minus_the_total_variation(seed: int) -> None:
    student, teacher = distributions(seed)
    s = torch.log_softmax(student, -1).detach()
    accepted = acceptance(s.float().numpy(), teacher.float().numpy())
    variation = 0.5 * float((s.exp() - teacher.exp()).abs().sum())
    assert float((s.exp().numpy() * accepted).sum()) == pytest.approx(1 - variation, abs=1e-6)


def test_the_sampled_partition_has_the_expected_one_as_its_mean() -> None:
    draws = 200_000
    student = torch.full((draws,), -1.0).numpy()
    teacher = torch.full((draws,), -1.7).numpy()
    expected = partition_tokens(
        ExpectedPartition(), student_logprobs=student[:1], teacher_logprobs=teacher[:1]
    )
    sampled = partition_tokens(
        SampledPartition(),
        student_logprobs=student,
        teacher_logprobs=teacher,
        uniforms=uniforms(7, range(draws)),
    )
    p = float(expected.trust[0])
    assert sampled.trust.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))
    assert (sampled.trust + sampled.outlier == 1).all()


def test_proximal_advantage_is_bounded_below_and_alpha_one_is_plain() -> None:
    advantages = torch.tensor([-math.inf, -50.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    for alpha in (0.1, 0.5, 0.9):
        result = proximal_advantage(advantages, alpha)
        exact = torch.log(alpha * advantages.exp() + 1 - alpha)
        assert torch.allclose(result, exact)
        assert float(result.min()) >= math.log(1 - alpha) - 1e-12
    assert torch.equal(proximal_advantage(advantages, 1.0), advantages)


def test_scaled_advantage_with_scale_one_is_the_plain_advantage() -> None:
    teacher, student, reference = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-3.0])
    assert torch.allclose(scaled_advantage(teacher, student, reference, 1.0), teacher - student)
    assert torch.allclose(
        scaled_advantage(teacher, student, reference, 1.25), torch.tensor([1.25 * 2.0 - 1.0])
    )


def test_importance_weights_make_off_policy_k1_exact_until_clipped() -> None:
    student, teacher = distributions(2)
    sampler = torch.log_softmax(
        torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(9)).double(), -1
    )
    logprobs = torch.log_softmax(student, -1)
    total = torch.zeros_like(student)
    for token in range(VOCABULARY):
        weight = importance_weight(logprobs[token], sampler[token], clip=1e9)
        loss = k1_policy_gradient(logprobs[token], log_ratio(teacher[token], logprobs[token]), weight)
        total += sampler[token].exp() * torch.autograd.grad(loss, student, retain_graph=True)[0]
    exact = gradient(reverse_kl(student, teacher), student)
    assert (total - exact).abs().max() < EXACT
    assert float(importance_weight(torch.tensor(0.0), torch.tensor(-3.0), clip=2.0)) == 2.0


def test_the_tail_floor_is_what_float32_can_resolve() -> None:
    assert torch.finfo(torch.float32).eps / 2 < TAIL_FLOOR < 10 * torch.finfo(torch.float32).eps
