"""Attention within the rows of a packed line, without a mask: memory grows with the length of a line, not its square.

On a GPU in half precision that is one call of PyTorch's kernel for rows of different lengths
(``torch.nn.attention.varlen``); elsewhere each row is attended by itself. Rows are told by ``row_inputs``, which models
of transformers hand through to their attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tropd.pipeline.models.runtime import to_device

ROW_ATTENTION = "tropd_rows"
HALF = (torch.float16, torch.bfloat16)


def attend_in_rows(model: Any) -> bool:
    """Have a model attend within rows; False, and nothing is changed, where its attention has parts that are not here.

    Such parts are attention in chunks, capped scores and sinks; and models that transformers does not run with flash
    attention may rely on masks for more than causality.
    """
    config = model.config.get_text_config()
    own = model.config._attn_implementation
    chunks = getattr(config, "attention_chunk_size", None)
    capped = getattr(config, "attn_logit_softcapping", None)
    if own != "sdpa" or not getattr(model, "_supports_flash_attn", False) or chunks or capped:
        return False
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return False
    AttentionInterface.register(ROW_ATTENTION, attend_rows)
    AttentionMaskInterface.register(ROW_ATTENTION, _no_mask)
    model.set_attn_implementation(ROW_ATTENTION)
    return bool(model.config._attn_implementation == ROW_ATTENTION)


def row_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of a model that say which rows follow one another in its lines, padding among them as rows of its own.

    Args:
        lengths: tokens of each row, line after line; together all tokens of the lines.
        device: of the model.
    """
    bounds, longest = _bounds(lengths, device), max(lengths)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """``[rows + 1]`` int32: where rows begin, and where the last one ends."""
    return to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def attend_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Output ``[B, W, H, D]`` of queries ``[B, H, W, D]``; without ``row_inputs`` each line is one row."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ValueError("attention within rows takes no mask, no capped scores and no sinks")
    query, key, value = _in_precision(query, key, value)
    lines, width = query.shape[0], query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _bounds([width] * lines, query.device), width
    # [tokens, heads, size], lines one after another
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    if query.is_cuda and query.dtype in HALF and not dropout:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        found = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        assert isinstance(found, Tensor)
    else:
        found = _row_by_row(q, k, v, cu_seq_lens_q, dropout, scaling, sliding_window)
    return found.unflatten(0, (lines, width)), None


def _in_precision(*parts: Tensor) -> tuple[Tensor, ...]:
    """In autocast's precision, which knows PyTorch's own attention but not this one."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts)


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    rows = []
    for begin, end in pairwise(bounds.tolist()):
        mask = None
        if sliding_window is not None and end - begin > sliding_window:
            ones = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(1 - sliding_window)
        q, k, v = (part[begin:end].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        found = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        rows.append(found[0].transpose(0, 1))
    return torch.cat(rows)
