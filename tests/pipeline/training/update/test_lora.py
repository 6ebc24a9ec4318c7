"""Adapters train, the rest stays; what leaves the trainer is merged; checkpoints hold adapters only."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the extra 'lora' is not installed")

from tiny_runs import TINY
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.training.record.checkpoint import (
    TENSORS,
    CheckpointWriter,
    load_checkpoint,
    newest_checkpoint,
)
from tropd.pipeline.training.record.sharded_tensors import stored_tensors
from tropd.pipeline.training.update.lora import add_adapters, merged_state
from tropd.pipeline.training.update.student import StudentPass
from tropd.storage.errors import ConfigError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage

IDS = torch.arange(24).reshape(2, 12) % 24


def adapted(tiny_model: Any, seed: int = 0) -> Any:
    model = copy.deepcopy(tiny_model)
    add_adapters(model, LoraSettings(rank=4, alpha=8.0), seed)
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_adapters_start_as_nothing_and_only_they_are_trained(tiny_model: Any) -> None:
    model = adapted(tiny_model)
    assert torch.allclose(model(input_ids=IDS).logits, tiny_model(input_ids=IDS).logits, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    train(model, optimizer_of(model), 3)
    state = model.state_dict()
    for name, value in tiny_model.state_dict().items():
        place, weight = name.rsplit(".", 1)
        assert torch.equal(state.get(f"{place}.base_layer.{weight}", state.get(name)), value), name
    assert StudentPass(model).packing == "lines"


def test_the_merged_model_is_the_adapted_one(tiny_model: Any) -> None:
    model = adapted(tiny_model)
    train(model, optimizer_of(model), 5)
    merged = copy.deepcopy(tiny_model)
    merged.load_state_dict(merged_state(model))
    expected = model(input_ids=IDS).logits
    assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-4)
    assert not torch.allclose(tiny_model(input_ids=IDS).logits, expected, atol=1e-2)
    # The rollout engine uses the adapters too, although it knows a shorter way for models without.
    options: dict[str, Any] = {"seeds": [0, 1], "max_tokens": [12, 12]}
    prompts = [[3, 4, 5], [6, 7]]
    one, other = (
        TransformersEngine(m, [1]).generate(prompts, Sampling(0.0), **options) for m in (model, merged)
    )
    assert [g.tokens for g in one] == [g.tokens for g in other]


def test_a_checkpoint_holds_adapters_and_resumes_bit_for_bit(tiny_model: Any, tmp_path: Path) -> None:
    straight = adapted(tiny_model)
    straight_optimizer = optimizer_of(straight)
    train(straight, straight_optimizer, 4)
    model = adapted(tiny_model)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    with open_stage(tmp_path / "train", "train", Fingerprint({"a": 1})) as stage:
        with CheckpointWriter(stage, keep=1) as writer:
            writer.save(2, model, optimizer, {})
        folder = newest_checkpoint(stage)
        assert folder is not None
        names = stored_tensors(folder / TENSORS)
        assert {"model", "optimizer"} == {name.split(".")[0] for name in names}
        assert all("lora_" in name for name in names)
        resumed = adapted(tiny_model, seed=9)
        resumed_optimizer = optimizer_of(resumed)
        assert load_checkpoint(folder, resumed, resumed_optimizer) == (2, {})
    train(resumed, resumed_optimizer, 2)
    for (name, one), (_, other) in zip(resumed.named_parameters(), straight.named_parameters(), strict=True):
        assert torch.equal(one, other), name


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, **EXPERTS, num_experts=4, head_dim=8)),
        (MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)),
    ],
    ids=["qwen3_moe", "mixtral"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_experts_are_merged_too(model_class: Any, config: Any, dtype: torch.dtype) -> None:
    """Experts are one tensor, which peft adapts in layers around layers."""
    torch.manual_seed(0)
    plain = model_class(config).to(dtype).eval()
    model = adapted(plain)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # trying left nothing behind
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    train(model, optimizer_of(model), 5)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(merged_state(model))
    expected, tolerance = model(input_ids=IDS).logits, 1e-4 if dtype == torch.float32 else 0.2
    assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=tolerance)
    assert not torch.allclose(plain(input_ids=IDS).logits, expected, atol=2 * tolerance)


def test_what_peft_cannot_adapt_is_refused() -> None:
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    with pytest.raises(ConfigError, match="not possible with MambaForCausalLM: peft cannot adapt it"):
        adapted(MambaForCausalLM(MambaConfig(**sizes, state_size=8)))


def test_adapters_that_do_nothing_or_are_merged_otherwise_are_refused(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    with monkeypatch.context() as patch:
        delta = Linear.get_delta_weight
        patch.setattr(Linear, "get_delta_weight", lambda self, name: 1.5 * delta(self, name))
        with pytest.raises(ConfigError, match="merged, they change its logits differently"):
            adapted(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "forward", lambda self, x, *_, **__: self.base_layer(x))
        with pytest.raises(ConfigError, match="its forward pass does not use them"):
            adapted(tiny_model)


def test_layers_that_share_a_weight_are_refused(tiny_model: Any) -> None:
    shared = copy.deepcopy(tiny_model)
    one, other = (layer.mlp for layer in shared.model.layers)
    one.up_proj.weight = other.up_proj.weight
    with pytest.raises(ConfigError, match="share their weights"):
        adapted(shared)


def test_a_layer_that_is_used_twice_is_merged_under_both_names(tiny_model: Any) -> None:
    twice = copy.deepcopy(tiny_model)
    twice.model.layers[1].mlp = twice.model.layers[0].mlp
    model = adapted(twice)
    train(model, optimizer_of(model), 5)
    merged = copy.deepcopy(twice)
    merged.load_state_dict(merged_state(model))
    assert torch.allclose(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4)


def test_a_missing_peft_is_asked_for(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"tropd\[lora\]"):
        adapted(tiny_model)
