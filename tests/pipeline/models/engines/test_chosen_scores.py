"""Log-probs of given ids, their tail and overlap, from the scoring pass: against the whole softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.models.engines import scoring
from tropd.pipeline.models.engines.base import choose_with
from tropd.pipeline.models.engines.transformers import TransformersEngine

V = 24
LENGTHS = (3, 9, 5, 2)
STARTS = (1, 4, 5, 1)  # of the third sequence nothing is scored


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> TransformersEngine:
    return TransformersEngine(tiny_model, [1])


def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, V, size=n).tolist() for n in LENGTHS]


def given_ids(c: int, limit: int = V) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [
        np.array([generator.permutation(limit)[:c] for _ in range(n - start)], dtype=np.int32).reshape(
            n - start, c
        )
        for n, start in zip(LENGTHS, STARTS, strict=True)
    ]


@pytest.mark.parametrize("elements", [None, 3 * V])  # all positions at once, or three
@pytest.mark.parametrize("c", [1, 5, V])
def test_chosen_ids_have_their_own_log_probs_and_the_mass_outside(
    tiny_model: Any, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, c: int, elements: int | None
) -> None:
    if elements is not None:
        monkeypatch.setattr(scoring, "LOGIT_ELEMENTS_ON_CPU", elements)
    ids = given_ids(c)
    plain = engine.score(sequences(), STARTS, k=3, entropy=True)
    found = engine.score(sequences(), STARTS, k=3, entropy=True, chosen=ids, overlap=True)
    for sequence, start, asked, one, before in zip(sequences(), STARTS, ids, found, plain, strict=True):
        assert np.array_equal(one.token_logprobs, before.token_logprobs)
        assert np.array_equal(one.topk_ids, before.topk_ids)
        assert np.array_equal(one.entropy, before.entropy)
        assert one.chosen is not None
        assert one.chosen.overlap is not None
        with torch.no_grad():
            exact = torch.log_softmax(tiny_model(torch.tensor([sequence])).logits[0].double(), -1)
        for t in range(len(sequence) - start):
            row = exact[start + t - 1]
            assert one.chosen.logprobs[t] == pytest.approx([float(row[v]) for v in asked[t]], abs=1e-5)
            outside = [v for v in range(V) if v not in asked[t]]
            tail = float(row[outside].logsumexp(0)) if outside else -math.inf
            assert float(one.chosen.tail[t]) == pytest.approx(tail, abs=1e-5)
            best = set(row.topk(c).indices.tolist())
            assert float(one.chosen.overlap[t]) == pytest.approx(len(best & set(asked[t].tolist())) / c)


def test_a_tail_far_below_the_resolution_of_one_is_exact() -> None:
    head = torch.nn.Linear(4, V, bias=False)
    split = scoring.SplitModel(None, head, None)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0] = 10.0
    with torch.inference_mode():
        found = scoring.score_states(
            split,
            torch.ones(1, 4),
            torch.tensor([0]),
            k=0,
            entropy=False,
            limit=None,
            chosen=torch.tensor([[0]]),
        )
    assert found.chosen is not None
    assert float(found.chosen.tail[0]) == pytest.approx(math.log(V - 1) - 40.0, rel=1e-6)


@pytest.mark.parametrize("limit", [V, 10])
def test_an_engine_chooses_the_likeliest_ids_below_the_limit(
    tiny_model: Any, engine: TransformersEngine, limit: int
) -> None:
    found = choose_with(engine)(sequences(), STARTS, 4, limit)
    for sequence, start, ids in zip(sequences(), STARTS, found, strict=True):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([sequence])).logits[0, start - 1 : -1, :limit]
        assert np.array_equal(ids, logits.topk(4, dim=-1).indices.numpy())
        assert ids.dtype == np.int32
