"""Logits are not rounded to the precision of the weights; the gradient is that of the product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen3Config

from tropd.pipeline.models.engines import transformers
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import logprobs
from tropd.pipeline.models.output import output_layer as head_module
from tropd.pipeline.models.output.logprobs import token_logprobs
from tropd.pipeline.models.output.output_layer import PlainHead, plain_logits, split_model

SIZE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
BF16 = torch.bfloat16


@pytest.fixture(params=["plain", "soft cap"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config: Any = Qwen3Config(**SIZE, **HEADS, tie_word_embeddings=False)
    if request.param == "soft cap":
        config = Gemma2Config(**SIZE, **HEADS, final_logit_softcapping=30.0)
    found = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        found.lm_head.weight.mul_(100.0)  # logits of up to 30, as large models have
    return found


@pytest.mark.parametrize("kept_in", [torch.float32, BF16], ids=["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("chunk", [2, 100])
def test_logits_are_those_of_the_hidden_states(
    model: Any, kept_in: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * 40)
    split = split_model(model.to(kept_in))
    assert split.head is model.lm_head  # compared with the model, which rounds
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=kept_in == torch.float32):
        hidden = split.hidden(input_ids=ids)
        found = split.logits(hidden)
        rounded = split.capped(split.head(hidden).float())
        states = hidden.flatten(0, 1)
        chosen = token_logprobs(split, states, torch.arange(12)).targets
    exact = split.capped(hidden.float() @ model.lm_head.weight.float().T)
    assert found.dtype == torch.float32
    assert exact.abs().max() > 5
    assert (found - exact).abs().max() < 1e-4 < 0.01 < (rounded - exact).abs().max()
    expected = exact.flatten(0, 1).log_softmax(dim=-1)[torch.arange(12), torch.arange(12)]
    torch.testing.assert_close(chosen, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("wants_bias", [True, False])
@pytest.mark.parametrize("kept_in", [torch.float32, BF16])
def test_its_gradient_is_that_of_the_product(wants_bias: bool, kept_in: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(kept_in).requires_grad_()
        for shape in ((7, 16), (5, 16), (5,))
    ]
    states, weight, bias = inputs
    wanted = inputs if wants_bias else inputs[:2]
    slope = torch.randn(7, 5, generator=generator)
    found = torch.autograd.grad(
        (PlainHead.apply(states, weight, bias if wants_bias else None, BF16) * slope).sum(), wanted
    )
    product = states.float() @ weight.float().T + (bias.float() if wants_bias else 0)
    expected = torch.autograd.grad((product * slope).sum(), wanted)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == kept_in
        torch.testing.assert_close(one, two, atol=0.05, rtol=0.02)


def test_frozen_parts_get_no_gradient() -> None:
    states = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    PlainHead.apply(states, weight, torch.zeros(5), BF16).sum().backward()
    assert states.grad is not None
    assert weight.grad is None


def test_a_device_that_gives_sums_out_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU cannot; what a GPU does is played here."""
    states, weight, bias = (torch.randn(shape).to(BF16) * 4 for shape in ((6, 16), (5, 16), (5,)))
    assert not head_module.keeps_sums(states.device, BF16)

    def keeping(one: torch.Tensor, two: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        return one.to(out_dtype) @ two.to(out_dtype)

    monkeypatch.setattr(torch, "mm", keeping)
    head_module.keeps_sums.cache_clear()
    assert head_module.keeps_sums(states.device, BF16)
    expected = states.float() @ weight.float().T + bias.float()
    torch.testing.assert_close(plain_logits(states, weight, bias, BF16), expected)
    monkeypatch.undo()
    head_module.keeps_sums.cache_clear()


def test_a_weight_is_float32_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "BLOCK", 3)
    states, weight = torch.randn(6, 16).to(BF16), torch.randn(8, 16).to(BF16)
    found = plain_logits(states, weight, None, BF16)
    torch.testing.assert_close(found, states.float() @ weight.float().T)


@pytest.mark.parametrize("kept_in", [torch.float32, BF16], ids=["autocast", "bfloat16 weights"])
def test_nothing_may_be_asked_for(model: Any, kept_in: torch.dtype) -> None:
    """No token is an outlier, or a sequence has no token to score."""
    autocast = BF16 if kept_in == torch.float32 else None
    engine = TransformersEngine(model.to(kept_in), [3], autocast=autocast)
    (found,) = engine.score([[4, 5, 6]], [1], k=2, topk_where=lambda row, sampled, entropy: sampled > 0)
    assert found.topk_ids.shape == (0, 2)
    (none,) = engine.score([[4, 5, 6]], [3], k=2)
    assert none.token_logprobs.shape == (0,)


@pytest.mark.parametrize("kept_in", [torch.float32, BF16], ids=["autocast", "bfloat16 weights"])
def test_what_is_sampled_from_is_not_rounded_either(
    model: Any, kept_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of the sampler, against those of the same hidden states: only these are rounded."""
    monkeypatch.setattr(transformers, "takes_float32_stream", lambda model: False)  # only scoring has them
    autocast = BF16 if kept_in == torch.float32 else None
    engine = TransformersEngine(model.to(kept_in), [3], autocast=autocast, lean=False)
    prompts = [[4 + n, 5, 6] for n in range(4)]
    drawn = engine.generate(prompts, Sampling(), seeds=range(4), max_tokens=[12] * 4)
    scores = engine.score([[*p, *g.tokens] for p, g in zip(prompts, drawn, strict=True)], [3] * 4)
    off = np.concatenate([g.logprobs - s.token_logprobs for g, s in zip(drawn, scores, strict=True)])
    # Where the processor has no bfloat16, products of other row counts round a few hidden states differently.
    assert np.quantile(np.abs(off), 0.75) < 1e-3


def test_a_models_own_head_gives_its_last_position_only() -> None:
    config = GraniteConfig(**SIZE, num_attention_heads=2, num_key_value_heads=2, logits_scaling=3.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    split = split_model(model)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found = split.next_logits(input_ids=ids)
        expected = model(input_ids=ids).logits[:, -1]
    assert split.head is not model.lm_head
    torch.testing.assert_close(found, expected)
