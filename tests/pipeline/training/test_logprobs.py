"""Chunked log-probs against a plain log-softmax: values, gradients, lookups, overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tropd.pipeline.models import SplitModel
from tropd.pipeline.training import logprobs
from tropd.pipeline.training.logprobs import Lookups, token_logprobs

V, H, N = 50, 8, 23


@pytest.fixture
def problem() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups]:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(H, V, bias=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(N, H, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    counts = torch.tensor([i % 4 for i in range(N)])
    ids = torch.randint(V, (int(counts.sum()),), generator=generator)
    return head, states, targets, Lookups(counts, ids)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, N, 10 * N])
def test_values_and_gradients_do_not_depend_on_chunks(
    problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    softcap: float | None,
) -> None:
    head, states, targets, lookups = problem
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * V)
    result = token_logprobs(SplitModel(None, head, softcap), states, targets, lookups)
    weights = torch.linspace(-1, 1, N)
    alternative_weights = torch.linspace(0, 2, len(lookups.ids))
    loss = (weights * result.targets).sum() + (alternative_weights * result.lookups).sum()
    found = torch.autograd.grad(loss, [states, head.weight, head.bias])

    logits = head(states)
    exact = torch.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), -1)
    rows = torch.repeat_interleave(torch.arange(N), lookups.counts)
    target_logprobs, lookup_logprobs = exact[torch.arange(N), targets], exact[rows, lookups.ids]
    expected_loss = (weights * target_logprobs).sum() + (alternative_weights * lookup_logprobs).sum()
    expected = torch.autograd.grad(expected_loss, [states, head.weight, head.bias])
    assert torch.allclose(result.targets, target_logprobs, atol=1e-5)
    assert torch.allclose(result.lookups, lookup_logprobs, atol=1e-5)
    assert torch.allclose(result.entropy, -(exact.exp() * exact).sum(-1), atol=1e-5)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.allclose(mine, reference, atol=1e-4)


def test_overlap_counts_shared_ids(
    problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups],
) -> None:
    head, states, targets, lookups = problem
    result = token_logprobs(SplitModel(None, head, None), states, targets, lookups)
    exact = torch.log_softmax(head(states), -1)
    first = 0
    for i, count in enumerate(lookups.counts.tolist()):
        ids = lookups.ids[first : first + count].tolist()
        first += count
        if count == 0:
            assert np.isnan(float(result.overlap[i]))
        else:
            best = set(exact[i].topk(count).indices.tolist())
            assert float(result.overlap[i]) == pytest.approx(sum(x in best for x in ids) / count)


def test_nothing_to_score_is_not_an_error() -> None:
    head = torch.nn.Linear(H, V)
    states = torch.zeros(0, H, requires_grad=True)
    result = token_logprobs(SplitModel(None, head, None), states, torch.zeros(0, dtype=torch.long))
    (result.targets.sum() + result.lookups.sum()).backward()
    assert result.targets.shape == result.entropy.shape == (0,)
