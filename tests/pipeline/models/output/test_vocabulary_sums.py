"""Sums over the vocabulary: those of PyTorch, whatever the block, and for ids that are never drawn."""

from __future__ import annotations

import math

import pytest
import torch

from tropd.pipeline.models.output import vocabulary_sums

N, V = 11, 30


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("impossible", [0, 7])
def test_log_softmax_and_entropy(monkeypatch: pytest.MonkeyPatch, rows: int, impossible: int) -> None:
    monkeypatch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", rows * V)
    logits = 5 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    logits[:, V - impossible :] = -torch.inf
    exact = logits.double().log_softmax(dim=-1)
    possible = exact[:, : V - impossible]
    norms = torch.empty(N)
    logprobs = vocabulary_sums.log_softmax_(mine := logits.clone(), norms)
    assert logprobs is mine
    assert torch.allclose(norms.double(), logits.double().logsumexp(-1), atol=1e-5)
    assert torch.allclose(logprobs.double(), exact, atol=1e-5)
    assert torch.allclose(
        vocabulary_sums.entropy(logprobs).double(), -(possible.exp() * possible).sum(-1), atol=1e-5
    )
    assert torch.equal(logprobs, logits - norms.unsqueeze(-1)), "left as they were"


def test_what_is_no_number_is_not_hidden() -> None:
    logprobs = torch.full((2, V), 1.0 / V).log()
    logprobs[0, 3] = torch.nan
    found = vocabulary_sums.entropy(logprobs)
    assert found[0].isnan()
    assert float(found[1]) == pytest.approx(math.log(V), abs=1e-5)
