"""Rollout and scoring speed of the transformers engine, side by side with ``model.generate()`` in one run.

    python tests/benchmarks/bench_rollout.py

Prints tokens per second and ratios; the ratio is the result, absolute times depend on the machine's mood.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from tropd.pipeline.demo.tiny_models import STUDENT, make_model
from tropd.pipeline.engines.base import Sampling
from tropd.pipeline.engines.transformers import TransformersEngine

BATCH = 64
ROUNDS = 5
PROMPT = 10


def generate_all(model: Any, prompts: torch.Tensor, limit: int) -> None:
    """What a user of transformers would call; all rows decode to the longest."""
    config = GenerationConfig(
        do_sample=True, max_new_tokens=limit, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    with torch.inference_mode():
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)


def side_by_side(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios (second / first), measured in turns."""
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        pair = []
        for run in (first, second):
            started = time.perf_counter()
            run()
            pair.append(time.perf_counter() - started)
        times.append((pair[0], pair[1]))
    times = times[1:]  # the first round warms up
    one, two = (statistics.median(column) for column in zip(*times, strict=True))
    return one, two, statistics.median(b / a for a, b in times)


def main() -> None:
    torch.set_num_threads(1)
    model = make_model(STUDENT, seed=0).eval()
    model.generation_config.eos_token_id = None
    engine = TransformersEngine(model, [], batch_size=BATCH)
    generator = np.random.default_rng(0)
    prompts = generator.integers(2, 24, size=(BATCH, PROMPT))
    rows, tensor = prompts.tolist(), torch.from_numpy(prompts)
    print(f"tiny student, batch {BATCH}, one thread, median of {ROUNDS} rounds in turns")
    for name, limits in (
        ("equal lengths (36)", [36] * BATCH),
        ("lengths 8 to 64", generator.integers(8, 65, size=BATCH).tolist()),
    ):
        ours, theirs, ratio = side_by_side(
            partial(engine.generate, rows, Sampling(), seeds=range(BATCH), max_tokens=limits),
            partial(generate_all, model, tensor, max(limits)),
        )
        wanted = sum(limits)
        print(
            f"  rollout, {name}: {wanted / ours:,.0f} tokens/s, generate() {wanted / theirs:,.0f}: ratio {ratio:.2f}"
        )
    sequences = generator.integers(2, 24, size=(BATCH, 46)).tolist()
    starts = [PROMPT] * BATCH
    k1, top, ratio = side_by_side(
        partial(engine.score, sequences, starts), partial(engine.score, sequences, starts, k=5)
    )
    scored = BATCH * 36
    print(
        f"  scoring: K1 alone {scored / k1:,.0f} tokens/s, top-5 everywhere {scored / top:,.0f}: ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
