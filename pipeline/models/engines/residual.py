"""Hidden states in float32 from layer to layer, of a model whose weights are in bfloat16.

Each layer adds to them, and each sum would be rounded to 8 bits: of all that is rounded in a pass, this costs log-probs
the most (docs/scale.md). A student in training, whose weights are float32, has them in float32 anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tropd.pipeline.models.runtime import evaluation_mode, masked_attention

logger = logging.getLogger(__name__)
TOLERANCE = 0.05
"""Difference that rounding explains, as a share of the largest hidden state."""


@contextmanager
def float32_stream(model: Any) -> Iterator[None]:
    """While the block runs, embeddings come out in float32, and matrix products stay in the precision of the weights."""
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _given, found: found.float())
    try:
        with torch.autocast(model.device.type, dtype=model.dtype):
            yield
    finally:
        hook.remove()


def takes_float32_stream(model: Any) -> bool:
    """True if a model is in bfloat16, and its last hidden states come out in float32, and otherwise the same; found by
    trying, since each layer handles two precisions in its own way."""
    if model.dtype != torch.bfloat16:
        return False
    ids = torch.arange(12, device=model.device).view(2, 6) * 7 + 1
    ids = ids % model.get_input_embeddings().weight.shape[0]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with (
        torch.inference_mode(),
        masked_attention(model),
        evaluation_mode(model),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            own = model.base_model(**inputs).last_hidden_state
            with float32_stream(model):
                found = model.base_model(**inputs).last_hidden_state
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            logger.info("%s keeps its hidden states in bfloat16: %s", type(model).__name__, error)
            return False
    seen = mask.bool()
    size = float(own[seen].abs().max())
    same = bool((found[seen] - own[seen]).abs().max() <= TOLERANCE * size)
    return found.dtype == torch.float32 and same
