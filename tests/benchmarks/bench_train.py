"""Training speed side by side with TRL's ``DistillationTrainer``: ``python tests/benchmarks/bench_train.py``.

The same random student and teacher (Qwen3, 2 layers, hidden size 128, vocabulary 512), the same prompts, 32 responses
of at most 64 tokens per step, on-policy reverse KL, two cores, each in float32 and in bfloat16 (weights of the student
in float32, as both have it). TRL (in an environment of its own that is made in ``build/``) takes the KL over the whole
vocabulary in the trainer's process, with one thread and with two; a last row is TRL as it comes, which is in bfloat16
and with gradient checkpointing. tropd takes K1 of the sampled tokens (``opd``), with one thread per process; its teacher
is a service in a second process, as for any user. Further rows have it compile the models (``runtime.compile``) and
prepare a step while the one before trains (``train.max_staleness = 1``), whose parts then overlap.

Prints tokens per second, the ratios to the fastest of TRL's rows and to TRL as it comes, and where the time goes, in
steps 5 to 24; below it the same for the first six steps, with what is done once. Rounds are taken in turns.

``bench_train.py --models FOLDER`` takes the models ``teacher`` and ``student`` of a folder and their chat template
instead, as ``make demo-llm`` makes them, with 16 responses of at most 32 tokens and fewer steps; tropd then has the
threads that it chooses by itself.

Rows in bfloat16 are left out on a processor that multiplies it many times slower than float32, as one without
instructions for it does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
VENV = ROOT / "build" / "bench-trl"
REQUIREMENTS = ("trl==1.16.0", "torch==2.13.0", "transformers>=5.10,<6")
VOCAB = 512


@dataclass(frozen=True)
class Size:
    """One comparison's steps: responses of a step, tokens of a response, steps before and while measured."""

    batch: int
    tokens: int
    warm: int
    measured: int
    first: int
    rounds: int
    environment: dict[str, str]
    """Of tropd's processes."""

    @property
    def steps(self) -> int:
        return self.warm + self.measured


TINY = Size(32, 64, 4, 20, 6, 3, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
LLM = Size(16, 32, 2, 6, 2, 1, {})
OURS = {
    "tropd": (0, False, "float32"),
    "compiled": (0, True, "float32"),
    "one ahead": (1, False, "float32"),
    "one ahead, compiled": (1, True, "float32"),
    "bfloat16": (0, False, "bfloat16"),
    "bfloat16, compiled": (0, True, "bfloat16"),
    "bfloat16, both": (1, True, "bfloat16"),
}
AS_IT_COMES = "TRL as it comes"
TRL = {
    "TRL 1.16, 1 thread": (1, "float32"),
    "TRL 1.16, 2 threads": (2, "float32"),
    "TRL 1.16, bfloat16": (2, "bfloat16"),
    AS_IT_COMES: (2, "defaults"),
}
CONFIG = """
[rollout]
prompts_per_step = {size.batch}
samples_per_prompt = 1
max_tokens = {size.tokens}
[objective]
name = "opd"
[train]
steps = {size.steps}
learning_rate = {rate}
checkpoint_every = {size.steps}
"""
RATES = {"tiny": 1e-4, "llm": 5e-5}
SLOWEST_BFLOAT16 = 3.0
"""Times the time of float32 from which on rows in bfloat16 are left out."""


def bfloat16_slowness() -> float:
    """Time of a matrix product in bfloat16, in times of the same in float32, on this processor."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(5):
            x @ x
        return time.perf_counter() - start

    return seconds(torch.bfloat16) / seconds(torch.float32)


def trl_python() -> Path:
    """The interpreter of TRL's environment, made if it is missing."""
    done = VENV / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.touch()
    return VENV / "bin" / "python"


def make_models(folder: Path) -> list[str]:
    """Random models and a tokenizer of 512 words; returns prompts."""
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
    return [" ".join(f"w{n}" for n in generator.integers(3, VOCAB, size=16)) for _ in range(TINY.batch * 16)]


def take_models(source: Path, folder: Path) -> list[str]:
    """The models of a folder; returns prompts with their chat template around them."""
    for role in ("student", "teacher"):
        shutil.copytree(source / role, folder / "models" / role)
    tokenizer = AutoTokenizer.from_pretrained(source / "student")
    plain = [f"What is {a} plus {b}?" for a in range(12, 28) for b in range(13, 29)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in plain
    ]


def write_run(folder: Path, prompts: list[str], size: Size, rate: float) -> None:
    """Prompts and configuration of both sides."""
    (folder / "models" / "prompts.json").write_text(json.dumps(prompts))
    (folder / "data").mkdir()
    lines = [json.dumps({"id": str(n), "prompt": text}) for n, text in enumerate(prompts)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(CONFIG.format(size=size, rate=rate))


def run_ours(folder: Path, size: Size, staleness: int, compiled: bool, dtype: str) -> dict[str, Any]:
    """Steps of ``tropd train`` after the warm-up, from its metrics."""
    tropd = Path(sys.executable).with_name("tropd")
    options = ["--force", "--set", f"train.max_staleness={staleness}"]
    options += ["--set", f"runtime.compile={str(compiled).lower()}"]
    options += ["--set", f"teacher.dtype={dtype}", "--set", f"student.dtype={dtype}"]
    environment = os.environ | size.environment
    subprocess.run([tropd, "train", "-w", folder, *options], check=True, capture_output=True, env=environment)
    everything = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    first, records = everything[: size.first], everything[size.warm :]
    total = sum(r["time_total"] for r in records)
    return {
        "first": sum(r["tokens_on_policy"] for r in first) / sum(r["time_total"] for r in first),
        "rate": sum(r["tokens_on_policy"] for r in records) / total,
        "parts": {
            "rollout": sum(r["time_rollout"] for r in records) / total,
            "teacher": sum(r["time_score"] for r in records) / total,
            "train": sum(r["time_train"] for r in records) / total,
        },
    }


def run_trl(folder: Path, size: Size, rate: float, threads: int, how: str) -> dict[str, Any]:
    script = Path(__file__).with_name("trl_side.py")
    command = [trl_python(), script, folder / "models", size.steps, size.batch, size.tokens, how, rate]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"TRL failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    steps = found["steps"][size.warm :]
    tokens = found["tokens"] or [size.batch * size.tokens] * len(found["steps"])
    total = sum(steps)
    share = {
        "rollout": sum(found["generate"][size.warm :]) / total,
        "teacher": sum(found["teacher"][size.warm :]) / total,
    }
    return {
        "first": sum(tokens[: size.first]) / sum(found["steps"][: size.first]),
        "rate": sum(tokens[size.warm :]) / total,
        "parts": share | {"train": 1 - sum(share.values())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed beside TRL's")
    parser.add_argument("--models", type=Path, help="folder with the models teacher and student")
    parser.add_argument("--rounds", type=int)
    asked = parser.parse_args()
    size, rate = (LLM, RATES["llm"]) if asked.models else (TINY, RATES["tiny"])
    # PASSIVE, which the Makefile sets, would slow TRL's two threads down.
    os.environ.pop("OMP_WAIT_POLICY", None)
    trl_python()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        subprocess.run(
            [Path(sys.executable).with_name("tropd"), "init", folder, "--recipe", "demo"],
            check=True,
            capture_output=True,
        )
        prompts = take_models(asked.models, folder) if asked.models else make_models(folder)
        write_run(folder, prompts, size, rate)
        slowness = bfloat16_slowness()
        dtypes = ("float32",) if slowness > SLOWEST_BFLOAT16 else ("float32", "bfloat16", "defaults")
        ours = {n: row for n, row in OURS.items() if row[2] in dtypes and not (asked.models and row[1])}
        theirs = {name: row for name, row in TRL.items() if row[1] in dtypes}
        rounds = [
            {name: run_ours(folder, size, *options) for name, options in ours.items()}
            | {name: run_trl(folder, size, rate, *options) for name, options in theirs.items()}
            for _ in range(asked.rounds or size.rounds)
        ]
    print(
        f"{size.batch} responses of at most {size.tokens} tokens per step, {size.measured} steps after {size.warm}, "
        f"{len(rounds)} rounds in turns"
    )
    if slowness > SLOWEST_BFLOAT16:
        print(
            f"  without rows in bfloat16, which this processor multiplies {slowness:.0f} times slower than float32"
        )
    for name in rounds[0]:
        column = [found[name] for found in rounds]
        parts = ", ".join(
            f"{part} {statistics.median(found['parts'][part] for found in column):.0%}"
            for part in ("rollout", "teacher", "train")
        )
        print(f"  {name:<20} {compared(rounds, name, 'rate')}; {parts}")
        print(f"  {'':<20} {compared(rounds, name, 'first')}: the first {size.first} steps")


def compared(rounds: list[dict[str, dict[str, Any]]], name: str, what: str) -> str:
    """Median tokens per second, and ratios to the fastest of TRL's settings in the same round and to its defaults."""
    rate = statistics.median(found[name][what] for found in rounds)
    ratios = [
        found[name][what] / max(row[what] for other, row in found.items() if other in TRL) for found in rounds
    ]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    said = f"{rate:8,.0f} tokens/s, ratio {statistics.median(ratios):.2f} ({each})"
    if AS_IT_COMES not in rounds[0]:
        return said
    plain = statistics.median(found[name][what] / found[AS_IT_COMES][what] for found in rounds)
    return f"{said}, to {AS_IT_COMES} {plain:.2f}"


if __name__ == "__main__":
    main()
