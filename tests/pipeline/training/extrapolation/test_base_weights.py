"""Stretching the way from the base weights: against naive float64, only where it is wanted, undone to the bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.objectives.extrapolation.settings import Extrapolation
from tropd.pipeline.training.extrapolation.base_weights import BaseWeights
from tropd.storage.errors import ConfigError

PARTS = Extrapolation().parameters


@pytest.fixture
def own_model(tiny_model: Any) -> Any:
    return copy.deepcopy(tiny_model)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-2)


def test_it_is_the_naive_extrapolation_of_attention_and_mlps(own_model: Any) -> None:
    base, start = BaseWeights(own_model, PARTS), values(own_model)
    moved(own_model, 0)
    before = values(own_model)
    base.stretch(2.0 / 3.0)
    after = values(own_model)
    stretched = set()
    for name, value in before.items():
        theta, theta_base = (np.asarray(x, dtype=np.float64) for x in (value, start[name]))
        wanted = theta + 2.0 / 3.0 * (theta - theta_base)
        if torch.equal(after[name], value):
            continue
        stretched.add(name)
        np.testing.assert_allclose(after[name].numpy(), wanted, rtol=2e-6, atol=2e-7)
    assert {name for name in before if ".self_attn." in name or ".mlp." in name} <= stretched
    assert not {
        name for name in stretched if "embed" in name or "lm_head" in name or name == "model.norm.weight"
    }


def test_copies_bring_the_weights_back_to_the_bit(own_model: Any) -> None:
    base = BaseWeights(own_model, PARTS)
    moved(own_model, 1)
    copies, before = base.copies(), values(own_model)
    base.stretch(2.0)
    assert any(not torch.equal(before[name], value) for name, value in values(own_model).items())
    base.restore(copies)
    assert all(torch.equal(before[name], value) for name, value in values(own_model).items())


def test_only_what_is_trained_takes_part_and_something_has_to(own_model: Any) -> None:
    names = [name for name, _ in own_model.named_parameters()]
    for name, parameter in own_model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    found = BaseWeights(own_model, PARTS).tensors()
    assert set(found) == {f"extrapolation.{name}" for name in names if "down_proj" in name}
    with pytest.raises(ConfigError, match=r"objective\.extrapolation\.parameters = \['router'\]: no trained"):
        BaseWeights(own_model, ["router"])
