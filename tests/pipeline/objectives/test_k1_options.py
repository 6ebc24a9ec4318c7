"""Every option of K1, on trusted tokens and on outliers, against plain loops; in float64."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.objectives.estimators import Alternatives
from tropd.pipeline.objectives.loss import TokenBatch, floored_log_ratio, plan_step, region_losses
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.objectives.token_weights import TokenStatistics

# Three rows: two answer the first prompt, one the second. Probabilities have few bits, so that float32 holds their logs'
# inputs; the logs themselves are rounded to float32 once, for both sides.
ROWS = [0, 0, 0, 1, 1, 2, 2]
GROUPS = [0, 0, 0, 0, 0, 1, 1]
S, T, REFERENCE = (
    np.log(np.array(values)).astype(np.float32)
    for values in (
        [0.25, 0.8, 0.5, 0.1, 0.6, 0.3, 0.9],
        [0.5, 0.1, 0.4, 0.3, 0.01, 0.6, 0.2],
        [0.2, 0.4, 0.5, 0.2, 0.3, 0.4, 0.5],
    )
)
OUTLIER = [0, 1, 0, 0, 1, 0, 1]
TOP_T, TOP_S = [0.5, 0.3], [0.25, 0.35]  # of every token
KL = sum(s * math.log(s / t) for s, t in zip([*TOP_S, 0.4], [*TOP_T, 0.2], strict=True))


def expected_advantages(loss: Any) -> list[float]:
    """As the fields of ``K1`` say, one after the other."""
    s, t, ref = S.astype(float), T.astype(float), REFERENCE.astype(float)
    a = [loss.reward_scale * (t[i] - ref[i]) - (s[i] - ref[i]) for i in range(len(ROWS))]
    if loss.proximal is not None:
        a = [math.log(loss.proximal * math.exp(x) + 1 - loss.proximal) for x in a]
    if loss.returns:
        later = [[a[j] for j in range(i + 1, len(a)) if ROWS[j] == ROWS[i]] for i in range(len(a))]
        a = [x + (sum(rest) / len(rest) if rest else 0.0) for x, rest in zip(a, later, strict=True)]
    if loss.standardize:
        groups = [[a[j] for j in range(len(a)) if GROUPS[j] == GROUPS[i]] for i in range(len(a))]
        means = [sum(g) / len(g) for g in groups]
        stds = [math.sqrt(sum((x - m) ** 2 for x in g) / len(g)) for g, m in zip(groups, means, strict=True)]
        a = [(x - m) / d for x, m, d in zip(a, means, stds, strict=True)]
    if loss.baseline == "kl":
        a = [x + KL for x in a]
    return a if loss.floor is None else [max(x, loss.floor) for x in a]


def options() -> list[dict[str, Any]]:
    found = []
    for scale, proximal, returns, standardize, baseline, floor in product(
        (1.0, 1.5), (None, 0.5), (False, True), (False, True), ("none", "kl"), (None, -0.3)
    ):
        given = {"reward_scale": scale, "returns": returns, "standardize": standardize, "baseline": baseline}
        given |= {} if proximal is None else {"proximal": proximal}
        given |= {} if floor is None else {"floor": floor}
        if baseline == "none" or not (returns or standardize):
            found.append(given)
    return found


def gradients(trust: dict[str, Any], outlier: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """The objective, and d loss / d log π_S of each token: minus its advantage, over the number of tokens."""
    objective = load_objective(
        "opd",
        {
            "partition": {"rule": "ratio", "threshold": 0.5},
            "trust": {"loss": {"estimator": "k1", **trust}},
            "outlier": {"loss": {"estimator": "k1", **outlier}},
        },
    )
    n = len(ROWS)
    mask = np.array(OUTLIER, dtype=np.float32)
    plan = plan_step(
        objective,
        Regions(1 - mask, mask),
        TokenStatistics(np.array(ROWS), floored_log_ratio(T, S), gain=floored_log_ratio(T, REFERENCE)),
        groups=np.array(GROUPS),
        guidance_rows=np.zeros(0, dtype=np.int64),
        progress=0.0,
    )

    def tensor(values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64))

    student = tensor(S).requires_grad_()
    batch = TokenBatch(
        student_logprobs=student,
        teacher_logprobs=tensor(T),
        mu_logprobs=tensor(S),
        trust=tensor(plan.trust),
        outlier=tensor(plan.outlier),
        trust_used=torch.from_numpy(np.flatnonzero(plan.trust)),
        outlier_used=torch.from_numpy(np.flatnonzero(plan.outlier)),
        guidance=tensor([]),
        guidance_logprobs=tensor([]),
        trust_advantages=None if plan.trust_advantages is None else tensor(plan.trust_advantages),
        outlier_advantages=None if plan.outlier_advantages is None else tensor(plan.outlier_advantages),
        reference_logprobs=tensor(REFERENCE),
        topk_index=torch.arange(n),
        topk=Alternatives(
            tensor(TOP_T * n).log(), tensor(TOP_S * n).log(), torch.full((n,), 2), tensor([0.2] * n).log(),
            tensor([0.4] * n).log(),
        ),
    )  # fmt: skip
    (found,) = torch.autograd.grad(sum(region_losses(objective, batch).values(), torch.zeros(())), student)
    return objective, found


@pytest.mark.parametrize("region", ["trust", "outlier"])
def test_every_option_is_what_its_field_says_in_either_region(region: str) -> None:
    for given in options():
        objective, found = gradients(*((given, {}) if region == "trust" else ({}, given)))
        trusted, outlying = (expected_advantages(r.loss) for r in (objective.trust, objective.outlier))
        exact = [-(outlying if OUTLIER[i] else trusted)[i] / len(ROWS) for i in range(len(ROWS))]
        assert found.tolist() == pytest.approx(exact, abs=1e-12), given


def test_regions_have_options_of_their_own() -> None:
    objective, found = gradients({"returns": True}, {"standardize": True, "floor": -1.0})
    trusted, outlying = (expected_advantages(r.loss) for r in (objective.trust, objective.outlier))
    exact = [-(outlying if OUTLIER[i] else trusted)[i] / len(ROWS) for i in range(len(ROWS))]
    assert found.tolist() == pytest.approx(exact, abs=1e-12)
    assert trusted != outlying
