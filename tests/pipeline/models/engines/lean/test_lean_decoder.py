"""Decoding without modules gives what the model gives, for each known architecture, and is not tried for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import TINY

from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.models.engines.lean import lean_decoder as lean_module
from tropd.pipeline.models.engines.lean.lean_decoder import LeanModel, is_lean
from tropd.pipeline.models.engines.transformers import TransformersEngine


def make(kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(TINY | options))
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide what is left out
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model


def generate(model: Any, *, lean: bool, sampling: Sampling, equal: bool = False) -> list[Generation]:
    engine = TransformersEngine(model, [3], batch_size=5, lean=None if lean else False)
    assert engine.is_lean == lean
    sizes = [5 if equal else 1 + n for n in range(8)]
    prompts = [np.random.default_rng(n).integers(4, 40, size=size).tolist() for n, size in enumerate(sizes)]
    return engine.generate(prompts, sampling, seeds=list(range(8)), max_tokens=[3 + 4 * n for n in range(8)])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0)])
@pytest.mark.parametrize("equal", [False, True], ids=["padded", "equal"])
def test_responses_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], sampling: Sampling, equal: bool
) -> None:
    monkeypatch.setattr(lean_module, "FIRST_STEPS", 4)  # both caches have to grow
    model = make(kind, **options)
    for one, other in zip(
        generate(model, lean=True, sampling=sampling, equal=equal),
        generate(model, lean=False, sampling=sampling, equal=equal),
        strict=True,
    ):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_new_weights_are_seen_at_once() -> None:
    model = make("Qwen3")
    before = generate(model, lean=True, sampling=Sampling(0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    after = generate(model, lean=True, sampling=Sampling(0.0))
    expected = generate(model, lean=False, sampling=Sampling(0.0))
    assert [g.tokens for g in after] == [g.tokens for g in expected] != [g.tokens for g in before]


def test_what_is_not_known_is_left_to_transformers() -> None:
    assert is_lean(make("Qwen3"))
    assert not is_lean(make("Mistral", sliding_window=8))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not is_lean(make("Llama", rope_parameters=dynamic))
    assert not is_lean(make("Qwen3").to(torch.float64))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)
    )
    assert not is_lean(gpt2.eval())
    for dtype in (torch.float32, torch.bfloat16):
        assert is_lean(make("Llama").to(dtype))
        patched = make("Llama").to(dtype)
        patched.model.layers[0].mlp.act_fn = torch.nn.ReLU()
        assert not is_lean(patched)
        for other in ({"mlp_bias": True}, {"hidden_act": "gelu"}):
            unlike = make("Llama", **other, initializer_range=0.02).to(dtype)
            with torch.no_grad():  # rounding could explain what these differ by
                for name, parameter in unlike.named_parameters():
                    parameter.mul_(1e-3 if name.endswith("bias") else 1.0)
            assert not is_lean(unlike)
        hooked = make("Llama").to(dtype)
        hooked.model.norm.register_forward_hook(lambda norm, inputs, output: 2 * output)
        assert not is_lean(hooked)


@pytest.mark.parametrize(
    ("kind", "options"), [("Llama", {"attention_bias": True}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16})]
)
@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"])
def test_products_in_bfloat16_are_as_exact_as_the_models_own(
    kind: str, options: dict[str, Any], kept_in: torch.dtype
) -> None:
    """Log-probs of what was drawn, against the same weights in float32."""
    model = make(kind, **options).to(kept_in)
    exact = TransformersEngine(make(kind, **options).to(kept_in).float(), [3])
    autocast = torch.bfloat16 if kept_in == torch.float32 else None
    prompts = [np.random.default_rng(n).integers(4, 40, size=1 + n).tolist() for n in range(8)]
    errors = []
    for lean in (True, False):
        engine = TransformersEngine(model, [3], batch_size=5, autocast=autocast, lean=None if lean else False)
        assert engine.is_lean == lean
        drawn = engine.generate(prompts, Sampling(), seeds=list(range(8)), max_tokens=[20] * 8)
        rows = [[*p, *g.tokens] for p, g in zip(prompts, drawn, strict=True)]
        scores = exact.score(rows, [len(p) for p in prompts])
        off = np.concatenate([g.logprobs - s.token_logprobs for g, s in zip(drawn, scores, strict=True)])
        errors.append(float(np.sqrt(np.mean(off**2))))
    assert 1e-4 < errors[0] < 1.25 * errors[1] < 0.1


def test_in_bfloat16_the_weights_are_those_that_are_trained() -> None:
    """A norm's weights multiplied into them would be rounded to others."""
    model = make("Llama")
    lean, layer = LeanModel(model, torch.bfloat16).layers[0], model.model.layers[0]
    attention = layer.self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(lean.qkv, torch.cat(parts).bfloat16())
    assert torch.equal(lean.gate_up[:48], layer.mlp.gate_proj.weight.bfloat16())
    assert lean.gate_up_norm is not None
    assert lean.gate_up_norm.dtype == torch.float32
    assert LeanModel(model).layers[0].gate_up_norm is None


def test_compiled_code_is_shared_by_models_of_the_same_numbers_only() -> None:
    """A compiled step compares this key, and not each weight."""
    model = make("Llama")
    key = LeanModel(model).key
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert LeanModel(model).key == key
    others = [
        make("Llama", **changed)
        for changed in (
            {"rms_norm_eps": 0.1},
            {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4},
            {"vocab_size": 41},
            {"intermediate_size": 49},
            {"num_hidden_layers": 3},
            {"attention_bias": True},
        )
    ] + [make("Qwen3", head_dim=8)]
    assert len({key, *(LeanModel(other).key for other in others)}) == 1 + len(others)
