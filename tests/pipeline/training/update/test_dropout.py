"""Dropout: off in training, or repeatable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_run
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer, vocabulary
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.training.loop import train
from tropd.pipeline.training.update import dropout
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace

V = 30
PLAIN: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MODELS: dict[str, Any] = {
    "GPT-2: modules": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ),
    "Llama: a probability of its attention": lambda: LlamaForCausalLM(
        LlamaConfig(**PLAIN, attention_dropout=0.3)
    ),
    "OPT: functions and whole layers": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=V,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.3,
            layerdrop=0.3,
        )
    ),
    "Phi-MoE: noise of routers": lambda: PhimoeForCausalLM(
        PhimoeConfig(
            **PLAIN,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_jitter_noise=0.3,
            input_jitter_noise=0.3,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_random_in_training_mode(name: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that what is dropped is missed
    assert dropout.is_random(model)
    configured = model.config.to_json_string()
    dropout.turn_off(model)
    assert model.config.to_json_string() == configured
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(2, 12).unsqueeze(0)
    gradients = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_what_cannot_be_turned_off_is_refused() -> None:
    """Falcon's layers read the configuration itself, which is exported with the student."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.3
    )
    with pytest.raises(ConfigError, match=r"FalconForCausalLM is random") as refused:
        dropout.turn_off(FalconForCausalLM(config))
    assert "config.json" in str(refused.value.hint)


@pytest.fixture(scope="module")
def with_prefixes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose teacher and student are a GPT-2 with the dropout of its default configuration."""
    folder = tmp_path_factory.mktemp("dropout")
    torch.manual_seed(0)
    sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=len(vocabulary()), eos_token_id=1, bos_token_id=None, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder / "models")
    make_tokenizer().save_pretrained(folder / "models")
    generate_prefixes(make_run(folder / "run", folder / "models"))
    return folder / "run"


def trained(source: Path, target: Path, settings: str) -> dict[str, bytes]:
    """The final weights and what was measured, of supervised steps, which need no teacher."""
    shutil.copytree(source, target)
    text = (source / "config.toml").read_text().replace('"tropd"', '"sft"')
    text += f"[train]\nsteps = 2\nlearning_rate = 1e-2\n{settings}\n"
    resolved = parse_config(text.replace("[rollout]", "[rollout]\nprompts_per_step = 4"), where="config.toml")
    run = Run(Workspace.open(target), resolved, SILENT)
    train(run)
    return {"weights": (target / "train/final/model.safetensors").read_bytes()}


def test_two_runs_of_a_model_with_dropout_are_the_same(with_prefixes: Path, tmp_path: Path) -> None:
    off = [trained(with_prefixes, tmp_path / f"off{n}", "") for n in range(2)]
    on = [trained(with_prefixes, tmp_path / f"on{n}", "dropout = true") for n in range(2)]
    assert off[0] == off[1]
    assert on[0] == on[1]
    assert off[0] != on[0]
    assert json.loads((tmp_path / "off0/train/final/config.json").read_text())["resid_pdrop"] == 0.1
