"""The output layer of a model inside vLLM: logits of tokens only, and in float32.

By default vLLM rounds logits to the model's precision, as a linear layer does (see ``output_layer``); for log-probs that
a trainer compares with its own, its authors recommend ``head_dtype = "float32"``. On a GPU this is the same product,
whose sums come out as they are. On a CPU vLLM would convert the whole layer for every token, so there it is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.config.sections.value_types import Dtype


def head_overrides(folder: Path, dtype: Dtype, quantization: str | None, *, on_gpu: bool) -> dict[str, Any]:
    """Entries of the model's configuration, for ``hf_overrides``, by which vLLM computes logits in float32.

    Nothing for a model that is quantized, by itself or by vLLM: its output layer may be as well, which vLLM refuses.

    Args:
        folder: the model's directory.
        quantization: as vLLM is asked for it.
    """
    if dtype == "float32" or not on_gpu or quantization is not None:
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {} if config.get("quantization_config") else {"head_dtype": "float32"}


def keep_rows(number: int, model: torch.nn.Module) -> bool:
    """Have a model of vLLM compute no more logits than these: the softmax is over tokens, for samples and for scores.

    vLLM cuts off its own padding in this way. (``allowed_token_ids`` would leave the log-probs those of all
    rows.) Returns whether the model has the layer that does so.
    """
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if hasattr(layer, "org_vocab_size") and hasattr(layer, "_get_logits")
    ]
    for layer in layers:
        layer.org_vocab_size = min(layer.org_vocab_size, number)
    return bool(layers)
