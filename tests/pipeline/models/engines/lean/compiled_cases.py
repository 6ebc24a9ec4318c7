"""Compiled models give what they give uncompiled, from code that is made once and not for every size.

``test_compiled.py`` runs these in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.models.engines.draw import sample_tokens
from tropd.pipeline.models.engines.lean import lean_decoder
from tropd.pipeline.models.engines.lean.compiled import OPTIONS, check_compiler, compile_layers
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.storage.errors import ConfigError


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    try:
        check_compiler()
    except ConfigError as error:
        pytest.skip(f"no compiler here: {error}")


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How often something was compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    return lambda: int(counters["unique_graphs"] - before)


def make(kind: str, **changed: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(initializer_range=0.3, **(sizes | changed))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def same(found: list[Generation], expected: list[Generation]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_sampling_is_the_same_and_compiled_once(
    monkeypatch: pytest.MonkeyPatch, compilations: Callable[[], int]
) -> None:
    monkeypatch.setattr(lean_decoder, "FIRST_STEPS", 4)  # the cache has to grow
    model = make("Llama")
    plain, fast = (TransformersEngine(model, [3], batch_size=9, compiles=c) for c in (False, True))
    for sampling in (Sampling(), Sampling(0.0)):
        fast.prepare(sampling)
    assert compilations() == 4  # prompts and single tokens, drawn and greedy
    for rows in (1, 2, 9, 14):  # alone, with as many rows as other sizes of the model, and in two batches
        prompts = [[5 + n % 30] * (1 + n % 4) for n in range(rows)]
        limits = [2 + 3 * n for n in range(rows)]
        for sampling in (Sampling(), Sampling(0.0)):
            found, expected = (
                engine.generate(prompts, sampling, seeds=range(rows), max_tokens=limits)
                for engine in (fast, plain)
            )
            same(found, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found, expected = (
        engine.generate([[4, 5], [6]], Sampling(), seeds=[1, 2], max_tokens=[9, 9])
        for engine in (fast, plain)
    )
    same(found, expected)
    assert compilations() == 4


def test_lower_precision_has_code_of_its_own_and_rounds_no_more() -> None:
    prompts, limits = [[4, 5], [6, 7, 8], [9]], [9, 9, 9]
    model = make("Llama", num_hidden_layers=1)
    exact = TransformersEngine(model, [3])
    for autocast in (torch.bfloat16, None):
        fast = TransformersEngine(model, [3], compiles=True, autocast=autocast)
        drawn = fast.generate(prompts, Sampling(), seeds=range(3), max_tokens=limits)
        rows = [[*p, *g.tokens] for p, g in zip(prompts, drawn, strict=True)]
        scores = exact.score(rows, [len(p) for p in prompts])
        off = max(
            float(np.abs(g.logprobs - s.token_logprobs).max()) for g, s in zip(drawn, scores, strict=True)
        )
        assert off < 1e-5 if autocast is None else 1e-4 < off < 0.1


def test_models_of_other_numbers_have_code_of_their_own() -> None:
    prompts, seeds, limits = [[4, 5], [6, 7]], [1, 2], [9, 9]
    found: list[list[Generation]] = []
    for changed in ({}, {"intermediate_size": 56}, {}):
        model = make("Llama", num_hidden_layers=1, **changed)
        engines = [TransformersEngine(model, [3], compiles=compiles) for compiles in (True, False)]
        fast, plain = (e.generate(prompts, Sampling(), seeds=seeds, max_tokens=limits) for e in engines)
        same(fast, plain)
        found.append(fast)
    assert found[0] == found[2]
    assert found[0] != found[1]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniform_numbers_never_draw_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    draw = torch.compile(sample_tokens, options=OPTIONS)
    tokens, *_ = draw(logits, torch.full((2,), uniform, dtype=torch.float64), Sampling())
    assert set(tokens.tolist()) <= {1, 2}


def test_scores_and_gradients_are_the_same(compilations: Callable[[], int]) -> None:
    model, other = make("Qwen2"), make("Qwen2")
    plain, fast = TransformersEngine(other, []), TransformersEngine(model, [], compiles=True)
    sequences = [[4 + n] * (3 + n) for n in range(7)]
    for count in (7, 3):
        found, expected = (e.score(sequences[:count], [1] * count, k=3) for e in (fast, plain))
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.token_logprobs, two.token_logprobs, atol=1e-5)
            np.testing.assert_allclose(one.topk_logprobs, two.topk_logprobs, atol=1e-5)
    before = compilations()
    for rows, width in ((2, 11), (5, 7), (3, 30)):
        ids = torch.arange(rows * width).view(rows, width) % 40
        for one in (model, other):
            one(input_ids=ids, use_cache=False).logits.square().mean().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)
    # Forward and backward pass, whatever the sizes; the two layers share them.
    assert compilations() - before == 1


def test_a_model_whose_own_decoding_grows_a_cache_decodes_uncompiled(compilations: Callable[[], int]) -> None:
    model = make("Phi")
    engine = TransformersEngine(model, [], compiles=True)
    assert not engine.is_lean
    engine.score([[1, 2, 3]], [1])
    before = compilations()
    found = engine.generate([[4, 5], [6]], Sampling(), seeds=[1, 2], max_tokens=[9, 5])
    same(
        found,
        TransformersEngine(make("Phi"), []).generate(
            [[4, 5], [6]], Sampling(), seeds=[1, 2], max_tokens=[9, 5]
        ),
    )
    assert compilations() == before


def test_without_a_compiler_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler.cache_clear()

    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no g++ here\nand a long trace")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(ConfigError, match=r"runtime.compile .*no g\+\+ here\n"):
        compile_layers(make("Llama"))
    check_compiler.cache_clear()
