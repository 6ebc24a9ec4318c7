"""Memory and time of the student's log-probs at a real vocabulary: ``python tests/benchmarks/bench_logprobs.py``.

A student of 2 layers, hidden size 256, vocabulary 151,936 with tied embeddings, and 4,096 supervised tokens with
top-64 alternatives for a twentieth of them. One forward and backward pass with the logits held whole (autograd) and
in chunks (ours), each in a process of its own: peak resident memory above the model with its gradients and AdamW
state, and time; then ours for more and more tokens, and the line through their peaks, which gives bytes per token, with
and without the layers below (whose activations ``train.micro_batch_tokens`` bounds, and
``train.gradient_checkpointing`` makes smaller). Last, a model of the same shape scores a quarter of the tokens, with
top-64 and entropies, its logits held whole and in chunks. Linux only: the peak is the kernel's, reset after AdamW's step,
whose own is higher than what follows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

VOCAB, HIDDEN, WIDTH = 151_936, 256, 512
TOKENS = 4096
GROWTH = (2048, 4096, 8192, 12_288, 16_384)


def measure(kind: str, tokens: int, passes: int = 1) -> dict[str, float]:
    """In a fresh process: peak MB above the model, and seconds of the fastest pass."""
    command = [sys.executable, str(Path(__file__)), "--child", kind, str(tokens), str(passes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS``, or ``VmHWM``, the most it has had since the last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def child(kind: str, tokens: int, passes: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tropd.pipeline.models.allocator import keep_freed_memory
    from tropd.pipeline.models.engines.transformers import TransformersEngine
    from tropd.pipeline.models.output import logprobs
    from tropd.pipeline.models.output.logprobs import Lookups, token_logprobs
    from tropd.pipeline.models.output.output_layer import split_model

    keep_freed_memory()  # as wherever tropd loads a model
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

    engine = TransformersEngine(model, [0])

    def score_whole() -> None:
        logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(dim=-1)
        logprobs.gather(-1, ids[:, 1:, None])
        logprobs.topk(64, dim=-1)
        -(logprobs.exp() * logprobs).sum(dim=-1)

    def once() -> float:
        started = time.perf_counter()
        if kind == "score":
            engine.score(ids.tolist(), [1] * len(ids), k=64, entropy=True)
            return time.perf_counter() - started
        if kind == "score whole":
            with torch.inference_mode():
                score_whole()
            return time.perf_counter() - started
        if kind == "head":
            states = torch.randn(tokens, HIDDEN, requires_grad=True)
        else:
            states = split.hidden(input_ids=ids[:, :-1]).reshape(tokens, HIDDEN)
        result = token_logprobs(split, states, targets, lookups)
        (result.targets.mean() + result.lookups.mean()).backward()
        return time.perf_counter() - started

    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    seconds = min(once() for _ in range(passes))
    print(json.dumps({"mb": (resident("VmHWM") - before) / 1e6, "seconds": seconds}))


def compare(title: str, first: str, second: str, tokens: int) -> None:
    whole, ours = (measure(kind, tokens, passes=2) for kind in (first, second))
    print(f"{title}, vocabulary {VOCAB:,}")
    for name, found in (("logits held whole", whole), ("tropd, in chunks", ours)):
        print(f"  {name:<20} {found['mb']:8.0f} MB above the model   {found['seconds']:6.2f} s")
    print(
        f"  memory {whole['mb'] / ours['mb']:.1f} times less; time {ours['seconds'] / whole['seconds']:.2f} times"
    )


def main() -> None:
    compare(f"{TOKENS:,} supervised tokens, forward and backward", "whole", "chunks", TOKENS)
    for kind, name in (("head", "log-probs alone"), ("chunks", "with the layers' activations")):
        peaks = [measure(kind, tokens)["mb"] for tokens in GROWTH]
        per_token = np.polyfit(GROWTH, peaks, deg=1)[0] * 1e3
        shown = ", ".join(f"{mb:.0f} MB at {tokens:,}" for tokens, mb in zip(GROWTH, peaks, strict=True))
        print(f"  growth: {per_token:6.1f} kB per token, {name} ({shown})")
    compare(f"{TOKENS // 4:,} tokens scored, with top-64 and entropies", "score whole", "score", TOKENS // 4)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
