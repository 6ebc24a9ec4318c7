"""Model FLOPs utilization of training: the operations that a step needs, per second, as a share of the GPUs' peak.

As in PaLM (arXiv:2204.02311, appendix B), operations that are done again to save memory do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.step_time import model_operations

_PEAKS = {
    "NVIDIA A10": (125e12, "NVIDIA A10 data sheet"),
    "NVIDIA A100": (312e12, "NVIDIA A100 data sheet"),
    "NVIDIA B200": (2250e12, "NVIDIA Blackwell data sheet, HGX B200: 4.5 PFLOPS with sparsity"),
    "NVIDIA GeForce RTX 3090": (71e12, "NVIDIA GA102 white paper, with float32 sums"),
    "NVIDIA GeForce RTX 4090": (165.2e12, "NVIDIA Ada white paper, with float32 sums"),
    "NVIDIA H100 80GB HBM3": (989.4e12, "NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity"),
    "NVIDIA H100 PCIe": (756e12, "NVIDIA H100 data sheet, PCIe: 1,513 TFLOPS with sparsity"),
    "NVIDIA H100 NVL": (835e12, "NVIDIA H100 data sheet, NVL: 1,671 TFLOPS with sparsity"),
    "NVIDIA H200": (989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity"),
    "NVIDIA H200 NVL": (835e12, "NVIDIA H200 data sheet, NVL: 1,671 TFLOPS with sparsity"),
    "NVIDIA L4": (121e12, "NVIDIA L4 data sheet: 242 TFLOPS with sparsity"),
    "NVIDIA L40S": (362e12, "NVIDIA L40S data sheet: 733 TFLOPS with sparsity"),
}
"""Operations per second in dense matrix products in bfloat16, and the source, by PyTorch's name of the GPU."""
_FORM = r"(?:[ -](?:SXM\d?|PCI[eE]|\d+GB))*"
"""The rest of a name, which says the form and the memory of the same GPU: not a mobile one's, nor a part's (MIG)."""


def peak_operations(device: str) -> float | None:
    """Peak of a GPU by its name, in bfloat16 operations per second; None if it is not known."""
    found = [peak for name, (peak, _) in _PEAKS.items() if re.fullmatch(re.escape(name) + _FORM, device)]
    return found[0] if found else None


@dataclass(frozen=True)
class TrainingPeak:
    """What the GPUs that train could do at most, and the model that they train."""

    operations: float
    """Per second, of all GPUs together."""
    shape: ModelShape
    adapters: bool
    """Only adapters learn: the backward pass has no gradients of the weights."""

    def mfu(self, lengths: Sequence[int], seconds: float) -> float:
        """Share of the peak while rows of these lengths (tokens, prompts included) are trained on for ``seconds``."""
        return model_operations(lengths, self.shape, adapters=self.adapters) / (seconds * self.operations)


def training_peak(
    device: str, gpus: int, precision: torch.dtype, shape: ModelShape, *, adapters: bool
) -> TrainingPeak | None:
    """None where the peak is not known: another GPU, a CPU, or passes in another precision than 16 bits.

    Args:
        device: PyTorch's name of each GPU.
    """
    each = peak_operations(device)
    if each is None or precision not in (torch.bfloat16, torch.float16):
        return None
    return TrainingPeak(each * gpus, shape, adapters)
