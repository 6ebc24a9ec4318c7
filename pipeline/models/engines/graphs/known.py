"""The models whose decoding steps may be CUDA graphs."""

from __future__ import annotations

import logging
from typing import Any

from torch.distributed.tensor import DTensor

from tropd.pipeline.models.engines.graphs.token_graph import GraphUse
from tropd.pipeline.models.engines.lean.lean_decoder import is_known

logger = logging.getLogger(__name__)


def graphs_for(model: Any) -> GraphUse | None:
    """Graphs for a model of a plain architecture, all of it on one GPU: its passes never make the host wait, which a
    graph cannot. None for others, and on a CPU."""
    if model.device.type != "cuda":
        return None
    name = type(model).__name__
    tensors = [*model.parameters(), *model.buffers()]
    is_here = all(t.device == model.device and not isinstance(t, DTensor) for t in tensors)
    if is_here and is_known(model):
        return GraphUse(name, model.device)
    logger.info("%s decodes without CUDA graphs: not a plain architecture, or not whole on one GPU", name)
    return None
