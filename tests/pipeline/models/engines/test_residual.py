"""Models in bfloat16 score with hidden states in float32: closer to their weights in float32, or as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import TINY

from tropd.pipeline.models.engines.residual import float32_stream, takes_float32_stream
from tropd.pipeline.models.engines.transformers import TransformersEngine


def make(kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        **(TINY | {"num_hidden_layers": 12, "initializer_range": 0.1} | options)
    )
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def scores(model: Any) -> Any:
    rows = [np.random.default_rng(n).integers(4, 40, size=12 + n).tolist() for n in range(16)]
    return np.concatenate([one.token_logprobs for one in TransformersEngine(model, []).score(rows, [1] * 16)])


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_scores_are_closer_to_those_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(kind).bfloat16()
    assert takes_float32_stream(model)
    exact = scores(make(kind).bfloat16().float())
    streamed = np.abs(scores(model) - exact).mean()
    monkeypatch.setattr("tropd.pipeline.models.engines.transformers.takes_float32_stream", lambda _: False)
    own = np.abs(scores(model) - exact).mean()
    assert 1e-4 < streamed < 0.8 * own


def test_models_that_do_not_take_it_are_left_as_they_are() -> None:
    assert not takes_float32_stream(make("Llama"))
    for wrong in (lambda *_: (_ for _ in ()).throw(RuntimeError("two types")), lambda _m, _g, found: -found):
        model = make("Llama").bfloat16()

        def hook(module: Any, given: Any, found: Any, wrong: Any = wrong) -> Any:
            return wrong(module, given, found) if given[0].dtype == torch.float32 else None

        model.model.layers[2].mlp.register_forward_hook(hook)
        assert not takes_float32_stream(model)
        assert np.isfinite(scores(model)).all()


def test_it_ends_with_the_block() -> None:
    model = make("Llama").bfloat16()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        with float32_stream(model):
            assert model.base_model(ids).last_hidden_state.dtype == torch.float32
        assert model.base_model(ids).last_hidden_state.dtype == torch.bfloat16
