"""Training speed side by side with TRL's ``DistillationTrainer``: ``python tests/benchmarks/bench_train.py``.

The same random student and teacher (Qwen3, 2 layers, hidden size 128, vocabulary 512, float32), the same prompts, 32
responses of at most 64 tokens per step, on-policy reverse KL, one thread per process. TRL (in an environment of its own
that is made in ``build/``) takes the KL over the whole vocabulary in the trainer's process; tropd takes K1 of the sampled
tokens (``opd``), and its teacher is a service in a second process, as for any user. A second row has tropd prepare a
step while the one before trains (``train.max_staleness = 1``); the parts of its steps then overlap. Prints tokens per
second, the ratio, and where the time goes. Rounds are taken in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
VENV = ROOT / "build" / "bench-trl"
REQUIREMENTS = ("trl==1.16.0", "torch==2.13.0", "transformers>=5.10,<6")
VOCAB, BATCH, TOKENS = 512, 32, 64
WARM, MEASURED, ROUNDS = 2, 6, 3
CONFIG = f"""
[teacher]
dtype = "float32"
[student]
dtype = "float32"
[rollout]
prompts_per_step = {BATCH}
samples_per_prompt = 1
max_tokens = {TOKENS}
[objective]
name = "opd"
[train]
steps = {WARM + MEASURED}
learning_rate = 1e-4
checkpoint_every = {WARM + MEASURED}
"""


def trl_python() -> Path:
    """The interpreter of TRL's environment, made if it is missing."""
    done = VENV / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.touch()
    return VENV / "bin" / "python"


def make_inputs(folder: Path) -> None:
    """Models, a tokenizer of 512 words, prompts, and a workspace of tropd's."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder / "models" / role)
        tokenizer.save_pretrained(folder / "models" / role)
    generator = np.random.default_rng(0)
    prompts = [" ".join(f"w{n}" for n in generator.integers(3, VOCAB, size=16)) for _ in range(BATCH * 16)]
    (folder / "models" / "prompts.json").write_text(json.dumps(prompts))
    (folder / "data").mkdir()
    lines = [json.dumps({"id": str(n), "prompt": text}) for n, text in enumerate(prompts)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(CONFIG)


def run_ours(folder: Path, staleness: int) -> dict[str, Any]:
    """Steps of ``tropd train`` after the warm-up, from its metrics."""
    tropd = Path(sys.executable).with_name("tropd")
    options = ["--force", "--set", f"train.max_staleness={staleness}"]
    subprocess.run([tropd, "train", "-w", folder, *options], check=True, capture_output=True)
    records = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()][
        WARM:
    ]
    total = sum(r["time_total"] for r in records)
    return {
        "rate": sum(r["tokens_on_policy"] for r in records) / total,
        "parts": {
            "rollout": sum(r["time_rollout"] for r in records) / total,
            "teacher": sum(r["time_score"] for r in records) / total,
            "train": sum(r["time_train"] for r in records) / total,
        },
    }


def run_trl(folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("trl_side.py")
    command = [trl_python(), script, folder / "models", WARM + MEASURED, BATCH, TOKENS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"TRL failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    steps = found["steps"][WARM:]
    tokens = found["tokens"][WARM:] or [BATCH * TOKENS] * len(steps)
    total = sum(steps)
    share = {
        "rollout": sum(found["generate"][WARM:]) / total,
        "teacher": sum(found["teacher"][WARM:]) / total,
    }
    return {"rate": sum(tokens) / total, "parts": share | {"train": 1 - sum(share.values())}}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    trl_python()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        subprocess.run(
            [Path(sys.executable).with_name("tropd"), "init", folder], check=True, capture_output=True
        )
        make_inputs(folder)
        rounds = [(run_ours(folder, 0), run_ours(folder, 1), run_trl(folder)) for _ in range(ROUNDS)]
    print(
        f"{BATCH} responses of at most {TOKENS} tokens per step, {MEASURED} steps after {WARM}, {ROUNDS} rounds in turns"
    )
    for name, column in zip(("tropd", "one ahead", "TRL 1.16"), zip(*rounds, strict=True), strict=True):
        rate = statistics.median(found["rate"] for found in column)
        parts = ", ".join(
            f"{part} {statistics.median(found['parts'][part] for found in column):.0%}"
            for part in ("rollout", "teacher", "train")
        )
        print(f"  {name:<9} {rate:8,.0f} tokens/s   ({parts})")
    for name, place in (("tropd", 0), ("one ahead", 1)):
        ratios = [found[place]["rate"] / found[2]["rate"] for found in rounds]
        print(
            f"  ratio, {name}: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
        )


if __name__ == "__main__":
    main()
