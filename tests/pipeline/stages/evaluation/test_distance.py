"""Distances of two models: against sums over the whole vocabulary in float64, padded or not, in chunks and in batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.models.engines import proof

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_runs import TINY
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import vocabulary_sums
from tropd.pipeline.stages.evaluation import distance
from tropd.pipeline.stages.evaluation.distance import (
    DenseTopk,
    exact_distances,
    sampled_distances,
    topk_distances,
)

TOKENS = 24
CONFIGS: dict[str, Callable[[int], Any]] = {
    "linear": lambda rows: LlamaConfig(**TINY | {"vocab_size": rows}),
    "soft cap": lambda rows: Gemma2Config(
        **TINY | {"vocab_size": rows}, head_dim=8, final_logit_softcapping=5.0
    ),
    "tied": lambda rows: GPT2Config(
        vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3
    ),
    "whole": lambda rows: GraniteConfig(**TINY | {"vocab_size": rows}, logits_scaling=0.5),
}
LENGTHS = ((3, 9), (1, 1), (5, 14), (2, 20), (4, 3))
"""Of prompts and responses."""


def model(name: str, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = AutoModelForCausalLM.from_config(CONFIGS[name](rows)).eval()
    with torch.no_grad():  # a path that knows nothing of the limit would show at once
        found.get_output_embeddings().weight[TOKENS:] *= 2.0
    return found.to(dtype)


def sequences() -> tuple[list[list[int]], list[int]]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(TOKENS, size=sum(lengths)).tolist() for lengths in LENGTHS]
    return rows, [prompt for prompt, _ in LENGTHS]


def naive(model: Any, sequence: list[int], start: int) -> np.ndarray[Any, Any]:
    """``[n, TOKENS]`` log-probs in float64, with nothing but the model itself."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([sequence])).logits[0, start - 1 : -1, :TOKENS]
    return np.asarray(torch.log_softmax(logits.double(), dim=-1))


@pytest.fixture(params=[("linear", "tied"), ("soft cap", "linear"), ("whole", "linear"), ("tied", "whole")])
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.mark.parametrize(("rows", "other_rows"), [(TOKENS, TOKENS), (40, 32)], ids=["bare", "padded"])
@pytest.mark.parametrize("small", [False, True], ids=["at once", "in chunks"])
def test_exact_distances_are_the_sums_over_all_tokens(
    names: tuple[str, str], rows: int, other_rows: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # chunks of 3 positions, sums of 2
        monkeypatch.setattr(distance, "LOGIT_ELEMENTS_ON_CPU", 6 * max(rows, other_rows))
        monkeypatch.setattr(vocabulary_sums, "BLOCK_ELEMENTS", 2 * TOKENS)
    writer, other = model(names[0], rows, 0), model(names[1], other_rows, 1)
    engines = [TransformersEngine(m, [1], num_tokens=TOKENS) for m in (writer, other)]
    tokens, starts = sequences()
    found = exact_distances(*engines, tokens, starts, batch_tokens=40)
    for sequence, start, one in zip(tokens, starts, found, strict=True):
        p, q = naive(writer, sequence, start), naive(other, sequence, start)
        mass = np.exp(p)
        assert one.acceptance is not None
        assert one.entropy is not None
        assert one.kl == pytest.approx((mass * (p - q)).sum(-1), abs=1e-4)
        assert one.acceptance == pytest.approx(np.minimum(mass, np.exp(q)).sum(-1), abs=1e-4)
        assert one.entropy == pytest.approx(-(mass * p).sum(-1), abs=1e-4)


def test_a_model_is_at_no_distance_from_itself() -> None:
    engine = TransformersEngine(model("linear", 40, 0), [1], num_tokens=TOKENS)
    for one in exact_distances(engine, engine, *sequences(), batch_tokens=64):
        assert one.acceptance is not None
        assert one.kl.max() < 1e-6
        assert one.acceptance.min() > 1 - 1e-6


def test_models_of_other_vocabularies_are_refused() -> None:
    engines = [TransformersEngine(model("linear", 40, 0), [1], num_tokens=n) for n in (TOKENS, TOKENS - 1)]
    with pytest.raises(ValueError, match="one model has 24 tokens, the other 23"):
        exact_distances(*engines, *sequences(), batch_tokens=64)


def test_a_token_without_probability_leaves_distances_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, other = model("linear", TOKENS, 0), model("linear", TOKENS, 1)
    with torch.no_grad():
        other.lm_head = torch.nn.Linear(32, TOKENS)
        other.lm_head.bias[5] = -torch.inf
    monkeypatch.setattr(proof, "require_equal_scores", lambda *arguments: None)
    engines = [TransformersEngine(m, [1]) for m in (writer, other)]
    for one in exact_distances(*engines, *sequences(), batch_tokens=64):
        assert np.isfinite(one.kl).all()
        assert one.kl.max() > 10


@pytest.mark.parametrize("k", [1, 5, TOKENS - 1, TOKENS])
def test_alternatives_and_the_rest_are_a_distribution(k: int) -> None:
    teacher, student = model("linear", 40, 0), model("tied", 32, 1)
    engines = [TransformersEngine(m, [1], num_tokens=TOKENS) for m in (teacher, student)]
    tokens, starts = sequences()
    scores = engines[0].score(tokens, starts, k=k)
    alternatives = [DenseTopk(s.topk_ids, s.topk_logprobs) for s in scores]
    found = topk_distances(engines[1], tokens, starts, alternatives, batch_tokens=40)
    exact = exact_distances(*engines, tokens, starts, batch_tokens=40)
    for sequence, start, one, whole in zip(tokens, starts, found, exact, strict=True):
        p, q = naive(teacher, sequence, start), naive(student, sequence, start)
        order = np.argsort(-p, axis=-1)
        p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
        kl = (np.exp(p[:, :k]) * (p[:, :k] - q[:, :k])).sum(-1)
        if k < TOKENS:
            rest, mine = np.exp(p[:, k:]).sum(-1), np.exp(q[:, k:]).sum(-1)
            kl += rest * np.log(rest / mine)
        assert one.kl == pytest.approx(kl, abs=1e-4)
        assert (one.kl <= whole.kl + 1e-4).all()


def test_what_samples_say_is_the_same_on_average() -> None:
    """K1 and min(1, π_T/π_S) of many first tokens against the sums over all tokens."""
    student, teacher = model("linear", TOKENS, 0), model("linear", TOKENS, 1)
    engines = [TransformersEngine(m, [1], batch_size=4000) for m in (student, teacher)]
    prompt, count = [3, 4, 5], 4000
    drawn = engines[0].generate([prompt] * count, Sampling(), seeds=range(count), max_tokens=[1] * count)
    p, q = (naive(m, [*prompt, 0], 3)[0] for m in (student, teacher))
    ids = np.array([g.tokens[0] for g in drawn])
    found = sampled_distances(p[ids].astype(np.float32), q[ids].astype(np.float32))
    assert found.acceptance is not None
    kl, acceptance = (np.exp(p) * (p - q)).sum(), np.minimum(np.exp(p), np.exp(q)).sum()
    for values, expected in ((found.kl, kl), (found.acceptance, acceptance)):
        assert abs(values.mean() - expected) < 4 * values.std() / count**0.5
