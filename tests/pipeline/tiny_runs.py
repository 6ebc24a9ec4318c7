"""A run with untrained tiny models: every stage works, in milliseconds, and nothing it makes is any good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer, vocabulary
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.workspace import Workspace

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
"""Of models in memory, with weights large enough for tokens to differ."""

CONFIG = """
[data]
limit = 10
[teacher]
model = {models}
dtype = "float32"
[student]
model = {models}
dtype = "float32"
[prefixes]
samples_per_prompt = 2
shard_prompts = 4
batch_size = 4
[scores]
k = 5
[rollout]
max_tokens = 12
[objective]
name = "tropd"
k = 5
"""


def make_models(folder: Path, seed: int = 0) -> Path:
    """A random model of one layer with the demo's tokenizer; teacher and student are the same."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(vocabulary()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=40,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_run(folder: Path, models: Path, *, prompts: int = 10, extra: str = "") -> Run:
    """A workspace at ``folder`` that uses the models at ``models``."""
    workspace = Workspace.create(folder)
    workspace.config_path.write_text(CONFIG.format(models=json.dumps(str(models))) + extra)
    data = workspace.root / "data"
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"id": f"p{n}", "prompt": f"{n}+{n}=", "answer": str(2 * n)}) for n in range(prompts)]
    for name in ("train", "eval"):
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    resolved = parse_config(workspace.config_path.read_text(), where="config.toml")
    return Run(workspace, resolved, SILENT)
