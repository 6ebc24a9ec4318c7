"""The transformers engine against the plain model: log-probs, top-k, stopping, and independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.models.engines import scoring
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.draw import sample_tokens
from tropd.pipeline.models.engines.transformers import TransformersEngine

STOP = 1


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> TransformersEngine:
    return TransformersEngine(tiny_model, [STOP], batch_size=16)


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, 24, size=generator.integers(1, 9)).tolist() for _ in range(count)]


def reference_logprobs(model: Any, sequence: list[int]) -> torch.Tensor:
    """``[T - 1, V]`` of one unpadded sequence, float64 softmax."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([sequence])).logits[0, :-1].double(), -1)


def test_generated_logprobs_are_those_of_a_plain_forward(tiny_model: Any, engine: TransformersEngine) -> None:
    given = prompts(20)
    results = engine.generate(given, Sampling(), seeds=range(20), max_tokens=[12] * 20)
    for prompt, result in zip(given, results, strict=True):
        exact = reference_logprobs(tiny_model, prompt + result.tokens)[len(prompt) - 1 :]
        chosen = exact.gather(-1, torch.tensor(result.tokens).unsqueeze(-1)).squeeze(-1)
        assert np.allclose(chosen.numpy(), result.logprobs, atol=1e-5)


def test_logprobs_are_at_temperature_one_whatever_the_sampling(
    tiny_model: Any, engine: TransformersEngine
) -> None:
    prompt = [3, 4, 5]
    (result,) = engine.generate([prompt], Sampling(temperature=0.3, top_p=0.8), seeds=[1], max_tokens=[6])
    exact = reference_logprobs(tiny_model, prompt + result.tokens)[2:]
    chosen = exact.gather(-1, torch.tensor(result.tokens).unsqueeze(-1)).squeeze(-1)
    assert np.allclose(chosen.numpy(), result.logprobs, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_tokens_do_not_depend_on_the_batch(
    tiny_model: Any, engine: TransformersEngine, batch_size: int
) -> None:
    given = prompts(40)
    limits = [3 + i % 20 for i in range(40)]
    expected = engine.generate(given, Sampling(), seeds=range(40), max_tokens=limits)
    other = TransformersEngine(tiny_model, [STOP], batch_size=batch_size)
    order = list(reversed(range(40)))
    results = other.generate(
        [given[i] for i in order], Sampling(), seeds=order, max_tokens=[limits[i] for i in order]
    )
    for i, result in zip(order, results, strict=True):
        assert result.tokens == expected[i].tokens
        assert np.allclose(result.logprobs, expected[i].logprobs, atol=1e-5)


def test_finish_reasons_and_limits(engine: TransformersEngine) -> None:
    given = prompts(60)
    results = engine.generate(given, Sampling(), seeds=range(60), max_tokens=[15] * 60)
    assert {r.finish_reason for r in results} == {"stop", "length"}
    for result in results:
        stopped = result.tokens[-1] == STOP
        assert (result.finish_reason == "stop") == stopped
        assert STOP not in result.tokens[:-1]
        assert stopped or len(result.tokens) == 15


def test_a_response_ends_at_the_context_length(engine: TransformersEngine) -> None:
    (result,) = engine.generate([[5] * 60], Sampling(), seeds=[3], max_tokens=[50])
    assert len(result.tokens) <= 4


def test_greedy_equals_generate_of_transformers(tiny_model: Any) -> None:
    engine = TransformersEngine(tiny_model, [STOP])
    prompt = [7, 8, 9]
    (result,) = engine.generate([prompt], Sampling(temperature=0.0), seeds=[0], max_tokens=[10])
    expected = tiny_model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=STOP, pad_token_id=0
    )[0, 3:].tolist()
    assert result.tokens == expected


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    draws = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(draws))
    tokens, *_ = sample_tokens(probabilities.log().expand(draws, 5), uniforms, Sampling())
    counts = torch.bincount(tokens, minlength=5).double()
    expected = probabilities[:4].double() * draws
    assert counts[4] == 0
    assert float(((counts[:4] - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees, p = 0.001
    nucleus, *_ = sample_tokens(probabilities.log().expand(draws, 5), uniforms, Sampling(top_p=0.6))
    assert set(nucleus.tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.6), Sampling(1.7, 0.8), Sampling(1.0, 0.5)])
def test_tokens_come_with_the_log_probs_of_what_they_were_drawn_from(sampling: Sampling) -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(3))
    draws = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(draws))
    tokens, logprobs, drawn = sample_tokens(logits.expand(draws, 6), uniforms, sampling)
    own = torch.log_softmax(logits.double(), -1)
    expected = torch.softmax(logits.double() / sampling.temperature, -1)
    order = expected.argsort(descending=True)
    kept = order[: int((expected[order].cumsum(0) < sampling.top_p).sum()) + 1]
    nucleus = torch.zeros_like(expected).index_put((kept,), expected[kept])
    nucleus /= nucleus.sum()
    torch.testing.assert_close(logprobs, own[tokens].float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn, nucleus.log()[tokens].float(), atol=1e-6, rtol=0)
    shares = torch.bincount(tokens, minlength=6) / draws
    assert float((shares - nucleus).abs().max()) < 0.01


def test_a_greedy_choice_is_certain(tiny_model: Any) -> None:
    engine = TransformersEngine(tiny_model, [STOP])
    (result,) = engine.generate([[7, 8, 9]], Sampling(temperature=0.0), seeds=[0], max_tokens=[6])
    assert result.drawn_logprobs == [0.0] * len(result.tokens)
    assert max(result.logprobs) < 0.0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniform_numbers_never_draw_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    tokens, *_ = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert int(tokens) in (1, 2)


@pytest.mark.parametrize("positions", [1, 7, 1000])
def test_scores_equal_a_plain_forward(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS_ON_CPU", positions * 24)
    sequences = [p + p[::-1] for p in prompts(25)]
    starts = [1 + i % (len(s) - 1) for i, s in enumerate(sequences)]
    small = TransformersEngine(tiny_model, [STOP], batch_tokens=40)
    results = small.score(sequences, starts, k=5, entropy=True)
    for sequence, start, scores in zip(sequences, starts, results, strict=True):
        exact = reference_logprobs(tiny_model, sequence)[start - 1 :]
        sampled = exact.gather(-1, torch.tensor(sequence[start:]).unsqueeze(-1)).squeeze(-1)
        assert np.allclose(scores.token_logprobs, sampled, atol=1e-5)
        assert scores.entropy is not None
        assert np.allclose(scores.entropy, -(exact.exp() * exact).sum(-1), atol=1e-5)
        values, ids = exact.topk(5)
        assert np.array_equal(scores.topk_positions, np.arange(len(sampled)))
        assert np.allclose(scores.topk_logprobs, values, atol=1e-5)
        assert np.array_equal(scores.topk_ids, ids)


@pytest.mark.parametrize("positions", [1, 7, 1000])
def test_topk_only_where_asked_for(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    sequences = [p + p for p in prompts(9)]
    starts = [1] * 9
    full = engine.score(sequences, starts, k=4)
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS_ON_CPU", positions * 24)
    some = engine.score(sequences, starts, k=4, topk_where=lambda i, sampled, _: sampled < -3.0)
    assert 0 < sum(len(s.topk_positions) for s in some) < sum(len(s.token_logprobs) for s in some)
    for all_of_it, part in zip(full, some, strict=True):
        assert np.array_equal(part.topk_positions, np.flatnonzero(all_of_it.token_logprobs < -3.0))
        assert np.array_equal(part.topk_ids, all_of_it.topk_ids[part.topk_positions])
        assert np.allclose(part.topk_logprobs, all_of_it.topk_logprobs[part.topk_positions], atol=1e-6)


def test_topk_is_limited_to_the_vocabulary_asked_for(engine: TransformersEngine) -> None:
    (scores,) = engine.score([[2, 3, 4]], [1], k=64, vocab_limit=10)
    assert scores.topk_ids.shape == (2, 10)
    assert scores.topk_ids.max() < 10


@pytest.mark.parametrize(
    ("sequence", "start", "words"),
    [([2, 99], 1, "token id"), ([-1, 2], 1, "token id"), ([2, 3], 3, "start"), ([2] * 65, 1, "65 tokens")],
)
def test_bad_sequences_are_refused(
    engine: TransformersEngine, sequence: list[int], start: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine.score([[2, 3], sequence], [1, start], k=1)
