"""Every packaged objective on one hand-computed example of two student tokens and one prefix token.

The numbers of the example are below; what each method makes of them is written out with ``math`` from the
recipe's formula, not with the code under test.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tropd.pipeline.config.recipe_files import load_objective, recipe_names
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.objectives.estimators import LOGPROB_FLOOR, Alternatives
from tropd.pipeline.objectives.loss import TokenBatch, floored_log_ratio, plan_step, region_losses
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import partition_tokens
from tropd.pipeline.objectives.rewards.advantages import StepRewards
from tropd.pipeline.objectives.token_weights import TokenStatistics
from tropd.storage.errors import ConfigError

# Token 0: the teacher likes it more than the student (0.5 against 0.25). Token 1: less (0.1 against 0.8).
S = [0.25, 0.8]
T = [0.5, 0.1]
REFERENCE = [0.2, 0.4]
U = [0.3, 0.5]  # token 1: 0.5 > 0.1/0.8, so it is an outlier when sampled
STUDENT_ENTROPY = [1.2, 0.4]
TEACHER_ENTROPY = [0.5, 1.0]
# The teacher's two likeliest alternatives at each token, and the student's probabilities of them.
TOP_T = [[0.5, 0.3], [0.6, 0.2]]
TOP_S = [[0.25, 0.35], [0.1, 0.05]]
OVERLAP = [1.0, 0.5]
HOLDS_DRAWN = [True, False]  # the student's token is one of the two, or not
PREFIX_S = 0.4  # the student's probability of the teacher's prefix token
CACHED_T, CACHED_S = [0.7, 0.2], [0.4, 0.3]

A = [math.log(t / s) for t, s in zip(T, S, strict=True)]
K1 = [-a * math.log(s) for a, s in zip(A, S, strict=True)]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def with_tail(p: list[float]) -> list[float]:
    return [*p, 1 - sum(p)]


TRUNCATED = [kl(t, s) for t, s in zip(TOP_T, TOP_S, strict=True)]
REVERSE = [kl(with_tail(s), with_tail(t)) for t, s in zip(TOP_T, TOP_S, strict=True)]
FORWARD = [kl(with_tail(t), with_tail(s)) for t, s in zip(TOP_T, TOP_S, strict=True)]
TRUNCATED_REVERSE = [kl(s, t) for t, s in zip(TOP_T, TOP_S, strict=True)]
RENORMALIZED_REVERSE = [
    kl([x / sum(s) for x in s], [x / sum(t) for x in t]) for t, s in zip(TOP_T, TOP_S, strict=True)
]
RENORMALIZED = [kl([x / sum(t) for x in t], s) for t, s in zip(TOP_T, TOP_S, strict=True)]
NLL = -math.log(PREFIX_S)
C = math.log(0.1) / 0.9


def correction(token: int) -> float:
    own = S[token] / (1 - sum(TOP_S[token]))
    return math.log(own) - math.log(T[token] / (1 - sum(TOP_T[token])))


def jensen_shannon(token: int) -> float:
    t, s = with_tail(TOP_T[token]), with_tail(TOP_S[token])
    m = [(a + b) / 2 for a, b in zip(t, s, strict=True)]
    return 0.5 * kl(t, m) + 0.5 * kl(s, m)


def top_d() -> float:
    r = [math.log(0.5 * math.exp(a) + 0.5) for a in A]
    returns = [r[0] + r[1], r[1]]
    mean = sum(returns) / 2
    std = math.sqrt(sum((x - mean) ** 2 for x in returns) / 2)
    return sum(-(x - mean) / std * math.log(s) for x, s in zip(returns, S, strict=True)) / 2


def iw_opd() -> float:
    first = abs(A[0]) / (abs(A[0]) + abs(A[1]))
    return (1.5 * K1[0] + (1 + 0.5 * (1 - first)) * K1[1]) / 2


def exopd() -> float:
    advantages = [1.25 * math.log(t / r) - math.log(s / r) for t, s, r in zip(T, S, REFERENCE, strict=True)]
    return sum(-a * math.log(s) for a, s in zip(advantages, S, strict=True)) / 2


def fire_opd() -> float:
    # Doubt of the student and confidence of the teacher, against the larger of the two tokens' entropies.
    w = [(1 + 1 - 0.5 / 1.0) * (1 + 1.2 / 1.2), (1 + 1 - 1.0 / 1.0) * (1 + 0.4 / 1.2)]
    return (w[0] * K1[0] + w[1] * K1[1]) / sum(w)


def clipped_forward_kl(token: int) -> float:
    terms = [t * math.log(t / s) for t, s in zip(TOP_T[token], TOP_S[token], strict=True)]
    return sum(min(max(term, 0.0), 0.05) for term in terms)


def late(place: float) -> float:
    return 0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1))


# Two student tokens; the prefix token counts in the denominator where guidance has a loss.
EXPECTED = {
    "opd": (K1[0] + K1[1]) / 2,
    "tropd": (K1[0] + TRUNCATED[1] + 0.001 * NLL) / 3,
    "tropd-noguidance": (K1[0] + TRUNCATED[1]) / 2,
    "tropd-mask": K1[0] / 2,
    "tropd-clip": (K1[0] - max(A[1], C) * math.log(S[1])) / 2,
    "tropd-hard": (K1[0] + TRUNCATED[1] + 0.001 * NLL) / 3,
    "opd-clip": (K1[0] - max(A[1], C) * math.log(S[1])) / 2,
    "opd-mask": (K1[0] + (A[1] >= C) * K1[1]) / 2,
    "opd-clip-guided": (K1[0] - max(A[1], C) * math.log(S[1]) + 0.001 * NLL) / 3,
    "opd-mask-guided": (K1[0] + (A[1] >= C) * K1[1] + 0.001 * NLL) / 3,
    # A fifth of two tokens is the one that the student finds less likely; alone, it has the highest entropy.
    "fixed-penalty": 0.5 * math.log(S[0]),
    "opsa": 1.0 * math.log(S[0]),
    "fire-opd": fire_opd(),
    # One row: its weight over the mean of all is 1.
    "effopd": (K1[0] + K1[1]) / 2,
    "renio": (clipped_forward_kl(0) + clipped_forward_kl(1)) / 2,
    "tropd-cached": (K1[0] + TRUNCATED[1] + kl(with_tail(CACHED_T), with_tail(CACHED_S))) / 3,
    "full-fkl": sum(TRUNCATED) / 2,
    "eopd": (K1[0] + K1[1] + RENORMALIZED[1]) / 2,
    "entropy-opd": K1[0] / 2,
    "reopold": (K1[0] - max(A[1], C) * math.log(S[1])) / 2,
    "reopold-2stage": (K1[0] - max(A[1], C) * math.log(S[1])) / 2,
    "aopd": (K1[0] + TRUNCATED[1]) / 2,
    "tropd-aopd": (K1[0] + TRUNCATED[1] + 0.001 * NLL) / 3,
    "vopd": sum(-(a + r) * math.log(s) for a, r, s in zip(A, REVERSE, S, strict=True)) / 2,
    "exopd": exopd(),
    # Of two tokens one has the highest entropy, the other the highest divergence: both have a soft-or of 1.
    "tip": sum(REVERSE) / 2,
    "prune-opd-teacher": (1.5 * REVERSE[0] + (1 - 0.01 + 0.5) * REVERSE[1]) / 2,
    # Where the student chooses, its two ids happen to be those of TOP_S and TOP_T.
    "prune-opd": (1.5 * TRUNCATED_REVERSE[0] + (1 - 0.01 + 0.5) * TRUNCATED_REVERSE[1]) / 2,
    "rkl-topk": sum(REVERSE) / 2,
    "rkl-topk-sg": sum(TRUNCATED_REVERSE) / 2,
    "rkl-topk-renorm": sum(RENORMALIZED_REVERSE) / 2,
    "tail-aware": (sum(REVERSE) + correction(1)) / 2,
    "kl-mixing": sum(0.25 * r + 0.75 * f for r, f in zip(REVERSE, FORWARD, strict=True)) / 2,
    # The teacher's mass is the same at both tokens, so that neither can be preferred.
    "ta-opd": (K1[0] + K1[1]) / 2,
    "top-d": top_d(),
    "iw-opd": iw_opd(),
    "gkd": (jensen_shannon(0) + jensen_shannon(1)) / 2,
    "opsd": (jensen_shannon(0) + jensen_shannon(1)) / 2,
    "caopd": sum(REVERSE) / 2,
    "pw-opsd": sum(
        late(u) * kl(with_tail(t), with_tail(s)) for u, t, s in zip((0.25, 0.75), TOP_T, TOP_S, strict=True)
    )
    / 2,
    "sft": NLL,
    "offline-opd": (K1[0] + K1[1]) / 2,
    # One row, and it is wrong: nothing to compare it with (test_rewards.py has several).
    "grpo": 0.0,
    "dgrpo": (K1[0] + K1[1]) / 2,
    "opd-reward": (K1[0] + K1[1]) / 2,
    "uni-opd": (K1[0] + K1[1]) / 2,
    "scope": (K1[0] + K1[1]) / 2,
}


def logs(values: list[float]) -> np.ndarray:
    return np.log(np.array(values, dtype=np.float64)).astype(np.float32)


def loss_of(objective: Objective, *, progress: float = 0.1, student_tokens: int = 2) -> float:
    """The loss on the example, in float64, through the code under test."""
    n = student_tokens
    needs = teacher_needs(objective)
    student, teacher = logs(S[:n]), logs(T[:n])
    regions = partition_tokens(
        objective.partition,
        student_logprobs=student,
        teacher_logprobs=teacher,
        uniforms=np.array(U[:n]),
        teacher_entropy=np.array(TEACHER_ENTROPY[:n], dtype=np.float32),
        correct=np.zeros(n, dtype=np.bool_),
    )
    statistics = TokenStatistics(
        rows=np.zeros(n, dtype=np.int64),
        advantages=floored_log_ratio(teacher, student),
        student_entropy=np.array(STUDENT_ENTROPY[:n]),
        divergence=np.array(REVERSE[:n]),
        overlap=np.array(OVERLAP[:n]),
        student_logprobs=student.astype(np.float64),
        teacher_entropy=np.array(TEACHER_ENTROPY[:n]),
        teacher_mass=np.array([sum(t) for t in TOP_T[:n]]),
        rewards=StepRewards(np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)),
    )
    guided = objective.guidance.loss.estimator != "zero"
    plan = plan_step(
        objective,
        regions,
        statistics,
        groups=np.zeros(n, dtype=np.int64),
        guidance_rows=np.zeros(1 if guided else 0, dtype=np.int64),
        progress=progress,
    )

    def tensor(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64))

    def ragged(teacher_p: list[list[float]], student_p: list[list[float]]) -> Alternatives:
        return Alternatives(
            tensor(teacher_p).log().reshape(-1),
            tensor(student_p).log().reshape(-1).requires_grad_(),
            torch.full((len(teacher_p),), 2),
            tensor([1 - sum(p) for p in teacher_p]).log(),
            tensor([1 - sum(p) for p in student_p]).log().requires_grad_(),
            torch.tensor(HOLDS_DRAWN[: len(teacher_p)]),
        )

    has_topk = needs.topk != "none" or needs.chosen > 0
    index = (
        list(range(n))
        if needs.topk == "all" or needs.chosen
        else [i for i in range(n) if regions.outlier[i] > 0]
    )
    batch = TokenBatch(
        student_logprobs=tensor(S[:n]).log().requires_grad_(),
        teacher_logprobs=tensor(T[:n]).log(),
        mu_logprobs=tensor(S[:n]).log(),
        trust=tensor(plan.trust),
        outlier=tensor(plan.outlier),
        trust_used=torch.from_numpy(np.flatnonzero(plan.trust)),
        outlier_used=torch.from_numpy(np.flatnonzero(plan.outlier)),
        guidance=tensor(plan.guidance),
        guidance_logprobs=tensor([PREFIX_S] if guided else []).log().requires_grad_(),
        trust_advantages=None if plan.trust_advantages is None else tensor(plan.trust_advantages),
        reward_advantages=None if plan.reward_advantages is None else tensor(plan.reward_advantages),
        reference_logprobs=tensor(REFERENCE[:n]).log(),
        topk_index=torch.tensor(index, dtype=torch.long) if has_topk else None,
        topk=ragged([TOP_T[i] for i in index], [TOP_S[i] for i in index]) if has_topk and index else None,
        guidance_topk=ragged([CACHED_T], [CACHED_S]) if needs.cached_topk else None,
    )
    losses = region_losses(objective, batch)
    total = sum(losses.values(), torch.zeros(()))
    total.backward()
    for leaf in (batch.student_logprobs, batch.guidance_logprobs):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()
    return float(total.detach())


def test_every_packaged_objective_has_a_hand_computed_value() -> None:
    assert set(EXPECTED) == set(recipe_names("objectives"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_on_the_hand_computed_example(name: str) -> None:
    objective = load_objective(name)
    tokens = 0 if objective.rollouts == "teacher" else 2
    assert loss_of(objective, student_tokens=tokens) == pytest.approx(EXPECTED[name], abs=1e-6)


def test_the_second_phase_of_reopold_keeps_high_entropy_tokens_only() -> None:
    assert loss_of(load_objective("reopold-2stage"), progress=0.7) == pytest.approx(K1[0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "overrides", "same_as"),
    [
        ("tropd", {"partition": {"rule": "all"}, "guidance": {"weight": 0.0}}, "opd"),
        ("tropd", {"partition": {"rule": "none"}, "guidance": {"weight": 0.0}}, "full-fkl"),
        ("aopd", {"partition": {"rule": "sign", "margin": -1.0}, "reduction": "token_mean"}, "opd"),
        ("aopd", {"partition": {"rule": "sign", "margin": 1.0}, "reduction": "token_mean"}, "full-fkl"),
        ("aopd", {"partition": {"rule": "ratio", "threshold": 1.0}}, "aopd"),
        ("exopd", {"trust": {"loss": {"reward_scale": 1.0}}}, "opd"),
        ("reopold", {"trust": {"loss": {"floor": -1e9}}}, "opd"),
        ("iw-opd", {"token_weights": []}, "opd"),
        ("vopd", {"trust": {"loss": {"baseline": "none"}}}, "opd"),
        ("top-d", {"trust": {"loss": {"proximal": 1.0, "returns": False, "standardize": False}}}, "opd"),
        ("eopd", {"partition": {"threshold": 100.0}}, "opd"),
        ("kl-mixing", {"outlier": {"loss": {"reverse": 1.0}}}, "rkl-topk"),
        ("rkl-topk", {"outlier": {"loss": {"support": "truncated"}}}, "rkl-topk-sg"),
        ("tail-aware", {"outlier": {"loss": {"sample_corrected": False}}}, "rkl-topk"),
        ("prune-opd", {"token_weights": []}, "rkl-topk-sg"),
        ("ta-opd", {"token_weights": [{"kind": "teachability_top", "fraction": 1.0}]}, "opd"),
        ("tropd-hard", {"partition": {"rule": "sampled"}}, "tropd"),
        ("opd-clip", {"trust": {"loss": {"floor": -1e9}}}, "opd"),
        ("opd-mask", {"token_weights": [{"kind": "advantage_floor", "floor": -1e9}]}, "opd"),
        ("opsa", {"trust": {"loss": {"by_entropy": 0.0}}}, "fixed-penalty"),
        ("fire-opd", {"token_weights": []}, "opd"),
        ("renio", {"outlier": {"loss": {"entry_clip": None}}, "token_weights": []}, "full-fkl"),
    ],
)
def test_methods_reduce_to_each_other(name: str, overrides: dict[str, object], same_as: str) -> None:
    assert loss_of(load_objective(name, overrides)) == pytest.approx(EXPECTED[same_as], abs=1e-6)


@pytest.mark.parametrize("rule", ["all", "none", "sampled", "expected", "ratio", "sign"])
@pytest.mark.parametrize("support", ["truncated", "tail", "renormalized"])
def test_every_partition_rule_and_support_can_be_chosen(rule: str, support: str) -> None:
    objective = load_objective(
        "tropd", {"partition": {"rule": rule}, "outlier": {"loss": {"support": support}}}
    )
    value = loss_of(objective)
    assert math.isfinite(value)
    if rule == "expected":
        p = [min(t / s, 1.0) for t, s in zip(T, S, strict=True)]
        outlier = {"truncated": TRUNCATED, "renormalized": RENORMALIZED}.get(
            support, [kl(with_tail(t), with_tail(s)) for t, s in zip(TOP_T, TOP_S, strict=True)]
        )
        exact = sum(q * k + (1 - q) * o for q, k, o in zip(p, K1, outlier, strict=True)) + 0.001 * NLL
        assert value == pytest.approx(exact / 3, abs=1e-6)


def test_a_teacher_logprob_of_minus_infinity_is_an_outlier_and_no_nan() -> None:
    floor = np.array([-np.inf], dtype=np.float32)
    regions = partition_tokens(
        load_objective("tropd").partition,
        student_logprobs=np.array([-0.1], dtype=np.float32),
        teacher_logprobs=floor,
        uniforms=np.zeros(1),
    )
    assert regions.outlier[0] == 1
    assert floored_log_ratio(floor, np.array([-0.1], dtype=np.float32))[0] == pytest.approx(
        LOGPROB_FLOOR + 0.1
    )


def test_fine_tuning_on_the_teacher_takes_whole_responses() -> None:
    """A part of them would leave the rest to the student, whose tokens nobody scores then."""
    with pytest.raises(ConfigError, match="length = 'max'"):
        parse_config('[objective]\nname = "sft"\nschedule = { length = "uniform" }\n')
