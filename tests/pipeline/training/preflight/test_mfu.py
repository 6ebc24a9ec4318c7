"""Model FLOPs utilization against a reckoning by hand, and null where the peak is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.mfu import peak_operations, training_peak
from tropd.pipeline.training.preflight.step_time import model_operations

SHAPE = ModelShape(
    parameters=1_000_000,
    layers=2,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=1000,
    tied=True,
)
# Per row: 6 operations a parameter and token; three times attention's 4 S² D L, of which causality halves all.
BY_HAND = 6 * 1_000_000 * (100 + 300) + 3 * 2 * (100**2 + 300**2) * (4 * 16) * 2


def test_operations_agree_with_those_by_hand() -> None:
    assert model_operations([100, 300], SHAPE, adapters=False) == BY_HAND
    frozen = BY_HAND - 2 * 1_000_000 * 400
    assert model_operations([100, 300], SHAPE, adapters=True) == frozen
    # Embeddings of their own are looked up, not multiplied with.
    untied = replace(SHAPE, parameters=1_064_000, tied=False)
    assert model_operations([100, 300], untied, adapters=False) == BY_HAND
    assert model_operations([], SHAPE, adapters=False) == 0


def test_the_share_is_of_all_gpus_that_train() -> None:
    peak = training_peak("NVIDIA H100 80GB HBM3", 8, torch.bfloat16, SHAPE, adapters=False)
    assert peak is not None
    assert peak.mfu([100, 300], 1e-6) == pytest.approx(BY_HAND / (1e-6 * 8 * 989.4e12))


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 3060", None),
        ("", None),
    ],
)
def test_peaks_are_found_by_name(device: str, tera: float | None) -> None:
    assert peak_operations(device) == (None if tera is None else pytest.approx(tera * 1e12))


def test_no_share_is_made_up() -> None:
    assert training_peak("cpu", 1, torch.bfloat16, SHAPE, adapters=False) is None
    assert training_peak("NVIDIA H200", 1, torch.float32, SHAPE, adapters=False) is None
