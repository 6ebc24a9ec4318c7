"""Natural text and teacher scores for the cache benchmark: GSM8K, a BPE tokenizer and two small transformers.

Everything is made on the spot and kept under ``build/benchmarks`` for the next run: a byte-level BPE of 4,096
tokens, a teacher trained on the text that it scores until it is sure of most tokens (as a large model is on its
own reasoning), and as a student the same model halfway. Scored are more than 200,000 tokens of that text, and
20,000 tokens of problems that neither has seen, where the teacher is far less sure.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer

VOCAB_SIZE = 4096
K = 64
NUM_TOKENS = {"seen": 200_000, "unseen": 20_000}
EPOCHS = 18
MAX_LENGTH = 320
BATCH_TOKENS = 3_000
DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
KEPT = Path(__file__).parents[2] / "build" / "benchmarks"


def scores(data: Path = DATA, kept: Path = KEPT) -> dict[str, dict[str, np.ndarray]]:
    """Per text: ``ids``, ``logprobs``, ``student`` ``[tokens, K]``, ``sampled``, ``full_kl`` ``[tokens]``, ``lengths``.

    ``student`` are the student's log-probs of the teacher's ids; ``full_kl`` is the forward KL over the whole
    vocabulary.
    """
    kept.mkdir(parents=True, exist_ok=True)
    if not (kept / "seen.npz").exists() and not (data / "train.jsonl").exists():
        sys.exit(
            f"{data} does not exist: put GSM8K's train.jsonl and test.jsonl there (fields question, answer)"
        )
    if not (kept / "seen.npz").exists():
        _make(data, kept)
    return {name: dict(np.load(kept / f"{name}.npz")) for name in NUM_TOKENS}


def _texts(path: Path) -> list[str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [f"Question: {r['question']}\nAnswer: {r['answer']}\n" for r in records]


def _take(tokenizer: Any, texts: list[str], num_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    while sum(len(r) - 1 for r in rows) <= num_tokens:
        rows.append(tokenizer.encode(texts[len(rows)]).ids[:MAX_LENGTH])
    return rows


def _make(data: Path, kept: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train = _texts(data / "train.jsonl")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=VOCAB_SIZE, show_progress=False)
    texts = {
        "seen": _take(tokenizer, train, NUM_TOKENS["seen"]),
        "unseen": _take(tokenizer, _texts(data / "test.jsonl"), NUM_TOKENS["unseen"]),
    }
    teacher = _model()
    student = _train(teacher, texts["seen"])
    started = time.perf_counter()
    for name, rows in texts.items():
        arrays = _score(teacher, student, rows)
        print(f"{name}: {len(arrays['sampled'])} tokens, loss {-arrays['sampled'].mean():.2f}", flush=True)
        if name == "seen":
            arrays["scoring_seconds"] = np.array(time.perf_counter() - started)
        np.savez(kept / f"{name}.tmp.npz", **arrays)
    for name in reversed(texts):
        (kept / f"{name}.tmp.npz").rename(kept / f"{name}.npz")


def _model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.05,
        max_position_embeddings=MAX_LENGTH,
    )
    return Qwen3ForCausalLM(config)


def _batches(rows: list[list[int]], order: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows of similar length, padded with 0 (causal: what comes after a row does not matter)."""
    order = sorted(order, key=lambda i: len(rows[i]))
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[-1]]))
        order, chosen = order[:-size], order[-size:]
        longest = max(len(rows[i]) for i in chosen)
        yield chosen, torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in chosen])


def _train(model: Any, rows: list[list[int]]) -> Any:
    """Train on the rows; returns a copy of the model as it was halfway."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    student = _model()
    for epoch in range(EPOCHS):
        batches = list(_batches(rows, list(range(len(rows)))))
        total, started = 0.0, time.perf_counter()
        for number, place in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
            chosen, ids = batches[place]
            progress = (epoch + number / len(batches)) / EPOCHS
            optimizer.param_groups[0]["lr"] = (
                3e-3 * min(1.0, progress * 40) * 0.5 * (1 + math.cos(math.pi * progress))
            )
            lengths = torch.tensor([len(rows[i]) for i in chosen])
            mask = torch.arange(1, ids.shape[1])[None] < lengths[:, None]
            hidden = model.model(ids).last_hidden_state[:, :-1][mask]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
        print(f"epoch {epoch}: {total / len(batches):.2f}, {time.perf_counter() - started:.0f} s", flush=True)
        if epoch == EPOCHS // 2:
            student.load_state_dict(model.state_dict())
    return student


@torch.inference_mode()
def _score(teacher: Any, student: Any, rows: list[list[int]]) -> dict[str, np.ndarray]:
    found: dict[int, list[torch.Tensor]] = {}
    for chosen, ids in _batches(rows, list(range(len(rows)))):
        theirs = torch.log_softmax(teacher(ids).logits.float(), dim=-1)
        ours = torch.log_softmax(student(ids).logits.float(), dim=-1)
        for place, row in enumerate(chosen):
            length = len(rows[row]) - 1
            p, q = theirs[place, :length], ours[place, :length]
            top = p.topk(K, dim=-1)
            found[row] = [
                top.indices.int(),
                top.values,
                q.gather(1, top.indices),
                p.gather(1, ids[place, 1 : length + 1, None])[:, 0],
                (p.exp() * (p - q)).sum(-1),
            ]
    parts = [found[row] for row in range(len(rows))]
    names = ("ids", "logprobs", "student", "sampled", "full_kl")
    arrays = {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(names)}
    return arrays | {"lengths": np.array([len(r) - 1 for r in rows])}


if __name__ == "__main__":
    scores()
