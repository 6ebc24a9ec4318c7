"""Low-rank adapters: the student's linear layers stay as they are, and small matrices beside them are trained (peft).

Adapters are put into the model in place, so that everything else sees the model that it knows. What leaves the trainer
(the exported student, weights for another engine) is merged: W + (α/r)·B·A (Hu et al. 2021, eq. 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tropd.pipeline.config import LoraSettings
from tropd.storage.errors import ConfigError

_BASE = ".base_layer."


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and add adapters to all linear layers but the output layer.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "student.lora needs peft, which is not installed", hint='pip install "tropd[lora]"'
        ) from None
    import torch

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # A is random, B is 0
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state of the model that the adapted one is equal to, under the names of the original."""
    state = {
        name.replace(_BASE, "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = f"{name}.weight"
            state[weight] = state[weight] + module.get_delta_weight("default").to(state[weight].dtype)
    return state
