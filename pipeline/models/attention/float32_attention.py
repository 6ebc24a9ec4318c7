"""Attention in float32 between matrix products in a lower precision, for training on a CPU.

PyTorch's attention for CPUs is slow in bfloat16: its backward pass took four times as long as in float32, and more
than everything else in a layer, where the matrix products themselves were 2.5 times as fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32_SDPA = "tropd_float32_sdpa"


def attend_in_float32(model: Any) -> None:
    """Have a model that attends with SDPA do so in float32, whatever precision its matrix products have."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(FLOAT32_SDPA, _forward)
        AttentionMaskInterface.register(FLOAT32_SDPA, sdpa_mask)
        model.set_attn_implementation(FLOAT32_SDPA)


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(value.dtype), None
