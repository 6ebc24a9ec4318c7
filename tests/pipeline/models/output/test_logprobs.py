"""Chunked log-probs against a plain log-softmax: values, gradients, lookups, overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_memory import peak_bytes

from tropd.pipeline.models.output import logprobs, vocabulary_sums
from tropd.pipeline.models.output.logprobs import Lookups, chunk_elements, token_logprobs
from tropd.pipeline.models.output.output_layer import SplitModel, split_model
from tropd.pipeline.objectives.estimators import Alternatives, topk_forward_kl

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
@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (5, 2), (5, 5), (5, 100), (N, 4), (10 * N, 100)])
def test_values_and_gradients_do_not_depend_on_chunks(
    problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    block: int,
    softcap: float | None,
) -> None:
    head, states, targets, lookups = problem
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * V)
    monkeypatch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", block * V)
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


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.0, 300.0), st.integers(1, V - 1), st.booleans())
def test_the_tail_keeps_its_gradient_at_any_size(seed: int, depth: float, k: int, chunked: bool) -> None:
    """Forward KL with tail by the logits, against autograd in float64; ``depth``: how far down the tail's logits are."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(V, V, bias=False)  # states are the logits
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
    states = torch.randn(3, V, generator=generator)
    ids = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in range(3)])
    outside = torch.ones(3, V, dtype=torch.bool).scatter(1, ids, False)
    states = torch.where(outside, states - depth, states).requires_grad_()
    teacher = torch.log_softmax(torch.randn(3, k + 1, generator=generator), -1)

    exact_states = states.detach().double().requires_grad_()
    exact = torch.log_softmax(exact_states, -1)
    own = torch.cat(
        [exact.gather(1, ids), exact.masked_fill(~outside, -torch.inf).logsumexp(1, keepdim=True)], dim=1
    )
    (teacher.double().exp() * (teacher.double() - own)).sum().backward()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_ELEMENTS", 2 * V if chunked else 10 * V)
        patch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", V)
        lookups = Lookups(torch.full((3,), k), ids.reshape(-1), tail=True)
        found = token_logprobs(SplitModel(None, head, None), states, torch.tensor([1, 2, 3]), lookups)
    alternatives = Alternatives(
        teacher[:, :-1].reshape(-1), found.lookups, lookups.counts, teacher[:, -1], found.tail
    )
    topk_forward_kl(alternatives, "tail").sum().backward()
    assert states.grad is not None
    assert exact_states.grad is not None
    torch.testing.assert_close(found.tail.double(), own[:, -1], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(states.grad.double(), exact_states.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_tail_s_gradient_joins_those_of_targets_and_lookups(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(H, V)
    states = torch.randn(7, H, generator=generator).requires_grad_()
    counts = torch.tensor([0, 3, V, 1, 0, V - 1, 2])
    ids = torch.cat([torch.randperm(V, generator=generator)[:n] for n in counts.tolist()])
    lookups, targets = Lookups(counts, ids, tail=True), torch.arange(7)
    rows = torch.repeat_interleave(torch.arange(7), counts)
    results = []
    for size in (3, 100):  # recomputed in the backward pass, and kept
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", size * V)
        found = token_logprobs(SplitModel(None, head, softcap), states, targets, lookups)
        loss = (found.tail.masked_fill(found.tail.isneginf(), 0.0) * torch.arange(1, 8)).sum()
        loss = loss + found.targets.sum() + (found.lookups * torch.linspace(0, 1, len(ids))).sum()
        results.append((found.tail, *torch.autograd.grad(loss, [states, head.weight, head.bias])))
    logits = head(states)
    exact = torch.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), -1)
    outside = torch.ones(7, V, dtype=torch.bool).index_put((rows, ids), torch.tensor(False))
    places = [1, 3, 5, 6]
    tails = exact[places].masked_fill(~outside[places], -torch.inf).logsumexp(1)
    loss = (tails * (torch.tensor(places) + 1)).sum() + exact[torch.arange(7), targets].sum()
    loss = loss + (exact[rows, ids] * torch.linspace(0, 1, len(ids))).sum()
    expected = torch.autograd.grad(loss, [states, head.weight, head.bias])
    for tail, *gradients in results:
        assert tail[2] == -torch.inf  # nothing is outside
        assert tail[[0, 4]].tolist() == [0.0, 0.0]  # nothing was looked up
        torch.testing.assert_close(tail[places], tails, atol=1e-5, rtol=0)
        for mine, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("chunk", [4, N])
def test_an_id_that_is_never_drawn_adds_no_entropy(
    problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    head, states, targets, lookups = problem
    with torch.no_grad():
        head.bias[V - 10 :] = -torch.inf
    short = torch.log_softmax(head(states)[:, : V - 10], dim=-1)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * V)
    result = token_logprobs(SplitModel(None, head, None), states, targets % (V - 10), lookups)
    assert torch.allclose(result.entropy, -(short.exp() * short).sum(-1), atol=1e-5)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vocab, hidden, chunk, few, many = 20_000, 16, 64, 640, 2_560
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * vocab)
    monkeypatch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", 2 * vocab)
    head = torch.nn.Linear(hidden, vocab, bias=False)

    def peak(n: int) -> int:
        states = torch.randn(n, hidden, requires_grad=True)
        targets, counts = torch.randint(vocab, (n,)), torch.where(torch.arange(n) % 20 == 0, 8, 0)
        lookups = Lookups(counts, torch.randint(vocab, (int(counts.sum()),)))
        head.weight.grad = None

        def work() -> None:
            result = token_logprobs(SplitModel(None, head, None), states, targets, lookups)
            (result.targets.mean() + result.lookups.mean()).backward()

        return peak_bytes(work, tmp_path)

    least = 4 * vocab * (chunk + hidden)  # a chunk's logits, and the head's gradient
    assert least < peak(few) < 1.3 * least
    assert peak(many) - peak(few) < 512 * (many - few)


def test_nothing_to_score_is_not_an_error() -> None:
    head = torch.nn.Linear(H, V)
    states = torch.zeros(0, H, requires_grad=True)
    result = token_logprobs(SplitModel(None, head, None), states, torch.zeros(0, dtype=torch.long))
    (result.targets.sum() + result.lookups.sum()).backward()
    assert result.targets.shape == result.entropy.shape == (0,)


@pytest.mark.parametrize("kind", ["linear", "no bias", "frozen", "unusual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunked_head_is_the_head(
    monkeypatch: pytest.MonkeyPatch,
    problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups],
    kind: str,
    dtype: torch.dtype,
) -> None:
    head, states, targets, lookups = problem
    if kind == "no bias":
        head.bias = None
    elif kind == "frozen":
        head.requires_grad_(False)
    elif kind == "unusual":
        head.register_forward_hook(lambda module, inputs, output: output)
    split = SplitModel(None, head, None)

    def run(chunk: int) -> list[torch.Tensor]:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * V)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = token_logprobs(split, states, targets, lookups)
        loss = (result.targets * torch.linspace(-1, 1, N)).sum() + result.lookups.sum()
        wanted = [t for t in (states, head.weight, head.bias) if t is not None and t.requires_grad]
        return [
            result.targets,
            result.lookups,
            result.entropy,
            result.overlap,
            *torch.autograd.grad(loss, wanted),
        ]

    whole, parts = run(N), run(4)
    assert len(whole) == {"linear": 7, "no bias": 6, "frozen": 5, "unusual": 7}[kind]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for expected, found in zip(whole, parts, strict=True):
        scale = max(1.0, float(expected.detach().nan_to_num().abs().max()))
        assert torch.allclose(found, expected, atol=tolerance * scale, equal_nan=True)
        assert found.dtype == expected.dtype


def test_tied_embeddings_get_both_gradients(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_model(tiny_model)
    ids = torch.arange(20).reshape(2, 10) % 24

    def gradients(chunk: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * 24)
        states = split.hidden(input_ids=ids)[:, :-1].reshape(18, -1)
        tiny_model.zero_grad()
        token_logprobs(split, states, ids[:, 1:].reshape(-1)).targets.sum().backward()
        return {name: p.grad.clone() for name, p in tiny_model.named_parameters()}

    whole, parts = gradients(18), gradients(5)
    assert "lm_head.weight" not in whole  # tied: one parameter
    for name, expected in whole.items():
        assert torch.allclose(parts[name], expected, atol=1e-4), name


def test_no_gradient_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, problem: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, Lookups]
) -> None:
    head, states, targets, lookups = problem
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * V)
    with torch.no_grad():
        result = token_logprobs(SplitModel(None, head, None), states, targets, lookups)
    assert not result.targets.requires_grad


def test_chunks_are_as_large_as_a_gpu_has_room_for() -> None:
    """Small ones read and write the head's gradient too often."""
    sizes = [chunk_elements(memory) for memory in (None, 4e9, 24e9, 80e9, 180e9)]
    assert sizes == [2**25, 2**25, 24e9 // 256, 2**28, 2**28]
