"""Large float32 matrices in the order in which oneDNN reads them, for products with few rows.

A decoding step multiplies each matrix of a model with a handful of rows: it costs the reading of the matrix. In PyTorch's
order that takes up to twice as long as in oneDNN's own, and a second thread gains nothing. Putting a matrix in order
costs about as much as one such product, and its bytes once more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGE = 2**18
"""Numbers of a matrix from which on it is worth it; smaller ones stay in the processor's cache."""


def packed(weight: Tensor) -> Tensor:
    """``[out, in]`` in oneDNN's order, if it is large, float32 and on a CPU; itself otherwise."""
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= LARGE
    if not (fits and torch.backends.mkldnn.is_available()):
        return weight
    ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return ordered


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a matrix as ``packed`` returns it; no gradients for ordered ones."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
