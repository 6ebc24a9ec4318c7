"""Matrices in oneDNN's order: the same products, and the same decoding, as in PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TINY
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder, LeanModel
from tropd.pipeline.models.engines.lean.packed import linear, packed


@pytest.mark.parametrize("rows", [1, 3, 17, 200])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_the_same(rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 2, 512), torch.randn(515, 512)
    bias = torch.randn(515) if biased else None
    ordered = packed(weight)
    assert ordered.is_mkldnn
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert float((linear(x, ordered, bias) - exact).abs().max()) < 2e-4  # of sums of 512 products
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


@pytest.mark.parametrize("weight", [torch.zeros(511, 512), torch.zeros(512, 512, dtype=torch.bfloat16)])
def test_small_ones_and_other_precisions_stay_as_they_are(weight: torch.Tensor) -> None:
    assert packed(weight) is weight


@torch.no_grad()
def test_decoding_is_the_same() -> None:
    sizes = TINY | {"hidden_size": 512, "intermediate_size": 640, "initializer_range": 0.02}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    draws = torch.zeros(3, dtype=torch.float64)
    found = []
    for weights in (LeanModel(model), LeanModel(model).pack()):
        decoder = LeanDecoder(weights, 24, Sampling(temperature=0.0))
        chosen = [decoder.start(prompts, 20, draws)] + [decoder.step(draws) for _ in range(19)]
        found.append([torch.stack(parts) for parts in zip(*chosen, strict=True)])
    layer = LeanModel(model).pack().layers[0]
    assert all(matrix.is_mkldnn for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)
