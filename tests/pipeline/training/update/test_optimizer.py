"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.config.sections.training_settings import TrainConfig
from tropd.pipeline.training.update.lora import add_adapters
from tropd.pipeline.training.update.optimizer import make_optimizer

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def decayed(model: Any) -> set[str]:
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(decays) == len(names)
    assert set(decays.values()) <= {0.1, 0.0}
    return {name.removeprefix("model.layers.0.") for name, p in names.items() if decays[p]}


MATRICES = {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {
    f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")
}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_decayed_but_norms_biases_and_embeddings_are_not(tied: bool) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    assert decayed(model) == MATRICES | (set() if tied else {"lm_head.weight"})


def test_positions_and_the_biases_of_other_architectures_are_not_either() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    found = {name.removeprefix("transformer.h.0.") for name in decayed(model)}
    assert found == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_adapters_are_decayed() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    add_adapters(model, LoraSettings(rank=2), 0)
    assert len(decayed(model)) == 2 * len(MATRICES)


def test_a_step_without_gradient_shrinks_matrices_only() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, learning_rate=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.removeprefix("model.layers.0.") for name in changed} >= MATRICES
    for name in changed:
        torch.testing.assert_close(model.get_parameter(name), before[name] * 0.95)
    assert not any("norm" in name or "bias" in name or "embed" in name for name in changed)
