"""Scores of hidden states against a plain log-softmax, for every kind of head, and their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensor_memory import peak_bytes

from tropd.pipeline.models.engines import scoring
from tropd.pipeline.models.engines.scoring import score_states, topk_of
from tropd.pipeline.models.output import vocabulary_sums
from tropd.pipeline.models.output.output_layer import SplitModel

N, H, V, K = 23, 8, 50, 5


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["plain", "no bias", "hooked", "whole"])
@pytest.mark.parametrize("positions", [1, 4, 100])
@pytest.mark.parametrize("limit", [None, 20])
def test_scores_are_those_of_a_log_softmax(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, kind: str, positions: int, limit: int | None
) -> None:
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS_ON_CPU", positions * V)
    torch.manual_seed(0)
    head: torch.nn.Module = torch.nn.Linear(H, V, bias=kind != "no bias")
    states = 3 * torch.randn(N, H)
    if kind == "hooked":
        head.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "whole":  # the "states" are the logits
        head, states = torch.nn.Identity(), 3 * torch.randn(N, V)
    split, before = SplitModel(None, head, softcap), states.clone()
    targets = torch.randint(V, (N,))
    with torch.inference_mode():
        found = score_states(split, states, targets, k=K, entropy=True, limit=limit)
        again = topk_of(split, states[3:9], found.norms[3:9], k=K, limit=limit)
        exact = split.capped(head(states)).double().log_softmax(dim=-1)
    assert torch.equal(states, before)
    assert torch.allclose(found.token_logprobs.double(), exact[torch.arange(N), targets], atol=1e-5)
    assert found.entropies is not None
    assert torch.allclose(found.entropies.double(), -(exact.exp() * exact).sum(-1), atol=1e-5)
    values, ids = exact[:, :limit].topk(K, dim=-1)
    assert torch.equal(found.top_ids, ids)
    assert torch.allclose(found.top_logprobs.double(), values, atol=1e-5)
    assert torch.equal(again[0], ids[3:9])
    assert torch.allclose(again[1], found.top_logprobs[3:9], atol=1e-6)


def test_nothing_to_score() -> None:
    split = SplitModel(None, torch.nn.Linear(H, V), None)
    with torch.inference_mode():
        found = score_states(
            split, torch.zeros(0, H), torch.zeros(0, dtype=torch.long), k=K, entropy=True, limit=None
        )
    assert found.token_logprobs.shape == (0,)
    assert found.top_ids.shape == (0, K)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vocab, chunk, n = 20_000, 64, 640
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS_ON_CPU", chunk * vocab)
    monkeypatch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", 2 * vocab)
    split = SplitModel(None, torch.nn.Linear(H, vocab), None)
    states, targets = torch.randn(n, H), torch.randint(vocab, (n,))
    with torch.inference_mode():
        peak = peak_bytes(
            lambda: score_states(split, states, targets, k=K, entropy=True, limit=None), tmp_path
        )
    logits = 4 * vocab * chunk
    assert logits < peak < 1.2 * logits
