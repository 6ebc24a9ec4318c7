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

from tropd.pipeline.models.engines.child.weights import ALLOCATOR_SETTINGS
from tropd.storage.errors import ConfigError

NAME = "tropd"


def for_vllm(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process for vLLM, made from that of another: without the settings of its allocator, since
    vLLM's sleep mode does not go with all of them."""
    return {name: value for name, value in environment.items() if name not in ALLOCATOR_SETTINGS}


@cache
def config() -> Any:
    """vLLM's configuration of the backend, which is registered with it in this process.

    Raises:
        ConfigError: this vLLM has another interface.
    """
    try:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    except ImportError as error:
        raise _too_old() from error
    # Before 0.25 this was the worker's affair, which would not call ``update_weights`` below.
    if not hasattr(IPCWeightTransferEngine, "start_weight_update"):
        raise _too_old()

    class Beside(IPCWeightTransferEngine):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            weights = update_info.get("weights")
            if weights is None:
                super().update_weights(update_info)
            else:
                self.model.load_weights(weights)

    WeightTransferEngineFactory.register_engine(NAME, Beside)
    return WeightTransferConfig(backend=NAME)


def _too_old() -> ConfigError:
    return ConfigError(
        "this vLLM cannot take the weights of a student in training: its weight transfer is another one",
        hint='install vLLM 0.27 or later, or set student.engine = "transformers"',
    )
