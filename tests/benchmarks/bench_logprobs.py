"""Memory and time of the student's log-probs at a real vocabulary: ``python tests/benchmarks/bench_logprobs.py``.

A student of 2 layers, hidden size 256, vocabulary 151,936 with tied embeddings, and 4,096 supervised tokens with
top-64 alternatives for a twentieth of them. One forward and backward pass with the logits held whole (autograd) and
in chunks (ours), each in a process of its own: peak resident memory above the model with its gradients and AdamW
state, and time; then ours for four times the tokens, which gives bytes per token, with and without the layers below
(whose activations ``train.micro_batch_tokens`` bounds, and ``train.gradient_checkpointing`` makes smaller).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

VOCAB, HIDDEN, WIDTH = 151_936, 256, 512
TOKENS = 4096


def measure(kind: str, tokens: int) -> dict[str, float]:
    """In a fresh process: peak MB above the model, and seconds of the fastest of two passes."""
    command = [sys.executable, str(Path(__file__)), "--child", kind, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def child(kind: str, tokens: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tropd.pipeline.head import split_model
    from tropd.pipeline.training import logprobs
    from tropd.pipeline.training.logprobs import Lookups, token_logprobs

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its state is allocated, and the gradients stay
    split = split_model(model)
    if kind == "whole":
        logprobs.CHUNK_ELEMENTS = 1 << 60
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (tokens // WIDTH, WIDTH + 1), generator=generator)
    targets = ids[:, 1:].reshape(-1)
    counts = torch.where(torch.arange(tokens) % 20 == 0, 64, 0)
    lookups = Lookups(counts, torch.randint(VOCAB, (int(counts.sum()),), generator=generator))

    fixed = torch.zeros(tokens if kind == "head" else 0, HIDDEN, requires_grad=True)

    def once() -> float:
        started = time.perf_counter()
        states = fixed if kind == "head" else split.hidden(input_ids=ids[:, :-1]).reshape(tokens, HIDDEN)
        result = token_logprobs(split, states, targets, lookups)
        (result.targets.mean() + result.lookups.mean()).backward()
        return time.perf_counter() - started

    before = psutil.Process().memory_info().rss
    seconds = min(once() for _ in range(2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"mb": (peak - before) / 1e6, "seconds": seconds}))


def main() -> None:
    whole, ours = measure("whole", TOKENS), measure("chunks", TOKENS)
    print(f"{TOKENS:,} supervised tokens, vocabulary {VOCAB:,}, forward and backward")
    for name, found in (("logits held whole, autograd", whole), ("tropd, chunks", ours)):
        print(f"  {name:<28} {found['mb']:8.0f} MB above the model   {found['seconds']:6.2f} s")
    print(
        f"  memory {whole['mb'] / ours['mb']:.1f} times less; time {ours['seconds'] / whole['seconds']:.2f} times"
    )
    for kind, name in (("chunks", "with the layers' activations"), ("head", "log-probs alone")):
        few, many = measure(kind, TOKENS), measure(kind, 4 * TOKENS)
        per_token = (many["mb"] - few["mb"]) * 1e3 / (3 * TOKENS)
        print(f"  growth up to {4 * TOKENS:,} tokens: {per_token:6.1f} kB per token, {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
