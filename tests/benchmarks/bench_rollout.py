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

from tropd.pipeline.experiments.demo.tiny_models import STUDENT, make_model
from tropd.pipeline.models.allocator import keep_freed_memory
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine

BATCH = 64
ROUNDS = 11
PROMPT = 10


def generate_all(model: Any, prompts: torch.Tensor, limit: int) -> None:
    """What a user of transformers would call; all rows decode to the longest."""
    config = GenerationConfig(
        do_sample=True, max_new_tokens=limit, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    with torch.inference_mode():
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)


def in_turns(*runs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each function, round by round; the first round warms up."""
    rounds = []
    for _ in range(ROUNDS + 1):
        times = []
        for run in runs:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        rounds.append(times)
    return [list(column) for column in zip(*rounds[1:], strict=True)]


def report(name: str, wanted: int, ours: list[float], theirs: list[float], other: str) -> None:
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"  {name}: {wanted / statistics.median(ours):,.0f} tokens/s, "
        f"{other} {wanted / statistics.median(theirs):,.0f}: ratio {ratio:.2f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in every process of tropd that loads a model; both sides have it
    model = make_model(STUDENT, seed=0).eval()
    model.generation_config.eos_token_id = None
    engines = {
        "": TransformersEngine(model, [], batch_size=BATCH),
        ", compiled": TransformersEngine(
            make_model(STUDENT, seed=0).eval(), [], batch_size=BATCH, compiles=True
        ),
    }
    generator = np.random.default_rng(0)
    prompts = generator.integers(2, 24, size=(BATCH, PROMPT))
    rows, tensor = prompts.tolist(), torch.from_numpy(prompts)
    print(f"tiny student, batch {BATCH}, one thread, median of {ROUNDS} rounds in turns")
    for name, limits in (
        ("equal lengths (36)", [36] * BATCH),
        ("lengths 8 to 64", generator.integers(8, 65, size=BATCH).tolist()),
    ):
        *ours, theirs = in_turns(
            *(
                partial(engine.generate, rows, Sampling(), seeds=range(BATCH), max_tokens=limits)
                for engine in engines.values()
            ),
            partial(generate_all, model, tensor, max(limits)),
        )
        for kind, times in zip(engines, ours, strict=True):
            report(f"rollout, {name}{kind}", sum(limits), times, theirs, "generate()")
    sequences = generator.integers(2, 24, size=(BATCH, 46)).tolist()
    starts = [PROMPT] * BATCH
    plain, compiled = engines.values()
    k1, top, faster = in_turns(
        partial(plain.score, sequences, starts),
        partial(plain.score, sequences, starts, k=5),
        partial(compiled.score, sequences, starts),
    )
    scored = BATCH * 36
    report("scoring, K1 alone", scored, k1, top, "top-5 everywhere")
    report("scoring, K1 alone, compiled", scored, faster, k1, "not compiled")


if __name__ == "__main__":
    main()
