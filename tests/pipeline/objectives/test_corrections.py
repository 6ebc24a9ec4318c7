"""Rollouts from another distribution: weighted, their expected gradient is that of the student's own. In float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.objectives.estimators import Alternatives
from tropd.pipeline.objectives.loss import TokenBatch, region_losses
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import partition_tokens
from tropd.storage.errors import ConfigError

VOCABULARY, K = 9, 3


def objective_of(settings: str, sampling: str) -> Objective:
    """What a run trains with; the clip of the weights out of reach."""
    text = f"[rollout]\n{sampling}\n[train]\nimportance_clip = 1e9\n[objective]\n{settings}"
    return parse_config(text, where="test").config.training_objective


def expected_gradient(objective: Objective, mu: torch.Tensor) -> torch.Tensor:
    """Σ_x μ(x)·∇(the loss of one token x), over the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.log_softmax(2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = teacher.topk(K)
    regions = partition_tokens(
        objective.partition,
        student_logprobs=logprobs.detach().numpy().astype(np.float32),
        teacher_logprobs=teacher.numpy().astype(np.float32),
    )
    total = torch.zeros_like(logits)
    for x in range(VOCABULARY):
        one = slice(x, x + 1)
        batch = TokenBatch(
            student_logprobs=logprobs[one],
            teacher_logprobs=teacher[one],
            mu_logprobs=mu[one],
            trust=torch.from_numpy(regions.trust[one]).double(),
            outlier=torch.from_numpy(regions.outlier[one]).double(),
            trust_used=torch.from_numpy(np.flatnonzero(regions.trust[one])),
            outlier_used=torch.from_numpy(np.flatnonzero(regions.outlier[one])),
            guidance=torch.zeros(0, dtype=torch.float64),
            guidance_logprobs=logprobs[:0],
            topk_index=torch.tensor([0]),
            topk=Alternatives(
                values,
                logprobs[ids],
                torch.tensor([K]),
                (-values.exp().sum()).log1p()[None],
                (-logprobs[ids].exp().sum()).log1p()[None],
            ),
        )
        loss = sum(region_losses(objective, batch).values(), torch.zeros(()))
        total += mu[x].exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return total


def logits_of_the_student() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        'name = "opd"',
        'name = "tropd-noguidance"\npartition = { rule = "expected" }',
        'name = "tropd-noguidance"\npartition = { rule = "ratio", threshold = 0.5 }',
        'name = "aopd"',
        'name = "full-fkl"',
        'name = "gkd"',
    ],
)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_at_another_temperature_the_expected_gradient_is_that_at_temperature_one(
    settings: str, temperature: float
) -> None:
    settings += f"\nk = {K}"
    logits = logits_of_the_student()
    own = expected_gradient(objective_of(settings, ""), torch.log_softmax(logits, -1))
    corrected = expected_gradient(
        objective_of(settings, f"temperature = {temperature}"), torch.log_softmax(logits / temperature, -1)
    )
    assert own.abs().max() > 1e-3
    assert (corrected - own).abs().max() < 1e-6  # the partition is computed from float32 log-probs


@pytest.mark.parametrize(
    "settings", ['name = "opd"', 'name = "tropd-noguidance"\npartition = { rule = "expected" }']
)
@pytest.mark.parametrize("clip", [1e9, 2.0], ids=["not clipped", "default"])
def test_in_bfloat16_the_expected_gradient_is_that_of_the_student_without_rounding(
    settings: str, clip: float
) -> None:
    """Tokens are drawn from logits that are off by what rounding does, and no weight comes near the clip."""
    text = f"[train]\nimportance_clip = {clip}\n[objective]\n{settings}\nk = {K}\n[student]\ndtype = "
    weighted, unweighted = (
        parse_config(f'{text}"{dtype}"', where="test").config.training_objective
        for dtype in ("bfloat16", "float32")
    )
    logits = logits_of_the_student()
    noise = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sampler = torch.log_softmax(logits + 0.05 * noise, -1)
    own = expected_gradient(unweighted, torch.log_softmax(logits, -1))
    assert (expected_gradient(weighted, sampler) - own).abs().max() < 1e-6
    assert (expected_gradient(unweighted, sampler) - own).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("text", "weighted"),
    [
        ("", False),
        ('[student]\ndtype = "float32"', False),
        ('[student]\ndtype = "bfloat16"', True),
        ('[teacher]\ndtype = "bfloat16"', False),
        ('[student]\ndtype = "bfloat16"\n[objective]\nname = "offline-opd"', False),
        ("[rollout]\ntemperature = 0.6", True),
        ("[rollout]\ntop_p = 0.9", True),
        ("[train]\nmax_staleness = 1", True),
        ('[student]\nengine = "vllm"', True),
        # What is stored was sampled once, by another model than this one: no engine of this run has drawn it.
        ('[student]\nengine = "vllm"\n[objective]\nname = "offline-opd"', False),
        ('[rollout]\ntemperature = 0.6\n[objective]\nname = "offline-opd"', False),
        ('[student]\nengine = "vllm"\n[objective]\nname = "sft"', False),
    ],
)
def test_weights_are_on_where_this_runs_student_draws_from_another_distribution(
    text: str, weighted: bool
) -> None:
    if "[objective]" not in text:
        text += '\n[objective]\nname = "opd"'
    config = parse_config(text, where="test").config
    assert config.rollouts_differ == weighted
    assert config.training_objective.importance.clip == (config.train.importance_clip if weighted else None)


def test_weights_of_stored_rollouts_need_log_probs_of_what_they_were_drawn_from() -> None:
    text = '[objective]\nname = "offline-opd"\nimportance = { clip = 2.0 }\n'
    assert parse_config(text, where="test").config.training_objective.importance.clip == 2.0
    with pytest.raises(ConfigError, match=r"rollout\.temperature = 1"):
        parse_config(text + "[rollout]\ntemperature = 0.7", where="test")
