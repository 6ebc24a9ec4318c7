"""The backend of vLLM's weight transfer for an engine beside its trainer.

https://docs.vllm.ai/en/v0.32.0/training/weight_transfer: an update is started, described, and finished; backends say
what a description is. This one is vLLM's own ``ipc``, which takes handles of a GPU's memory, and takes tensors of this
process as well: ``{"weights": [(name, tensor), …]}``. So start and finish are the same code on a GPU and on a CPU.

Imported where vLLM is; vLLM itself is imported by the calls only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

NAME = "tropd"
# Settings of the trainer's allocator: vLLM's sleep mode needs one of its own, which refuses some of them.
_OF_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def for_vllm(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process for vLLM, made from that of another."""
    return {name: value for name, value in environment.items() if name not in _OF_ALLOCATOR}


@cache
def config() -> Any:
    """vLLM's configuration of the backend, which is registered with it in this process."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    class Beside(IPCWeightTransferEngine):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            weights = update_info.get("weights")
            if weights is None:
                super().update_weights(update_info)
            else:
                self.model.load_weights(weights)

    WeightTransferEngineFactory.register_engine(NAME, Beside)
    return WeightTransferConfig(backend=NAME)
