"""Dropout of the student: off in training unless it is asked for, then with random numbers that a resumed run repeats.

Models have it as modules, as probabilities that their layers hand to functions, and as noise of routers; all of it is on
in training mode, which gradient checkpointing needs. So probabilities are set to 0, and that nothing random is left is
tried. The model's configuration, which is exported with it, stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from tropd.storage.errors import ConfigError
from tropd.storage.seeds import derive_seed

_CHANCE = re.compile("drop|jitter")


def turn_off(model: Any) -> None:
    """Set every probability of dropout, and every router's noise, to 0.

    Raises:
        ConfigError: the model is random in training mode still.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            chance = _CHANCE.search(name) or (isinstance(module, _DropoutNd) and name == "p")
            if chance and isinstance(value, float):
                setattr(module, name, 0.0)
    if is_random(model):
        raise ConfigError(
            f"{type(model).__name__} is random in training through more than dropout that can be turned off",
            hint="set its dropout to 0 in config.json, or train.dropout = true",
        )


def seed(step_seed: int, rank: int, micro_batch: int) -> None:
    """Seed PyTorch's generators for the forward pass of a micro-batch."""
    torch.manual_seed(derive_seed(step_seed, "micro-batch", rank, micro_batch))


def is_random(model: Any) -> bool:
    """True if two passes over a few tokens in training mode differ by more than rounding."""
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = ((torch.arange(8, device=model.device) * 7 + 1) % vocab).unsqueeze(0)

    def states() -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    was_training = model.training
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            before = states()
            one = model(input_ids=ids, use_cache=False).logits
            if all(map(torch.equal, before, states())):
                return False  # nothing was drawn
            torch.manual_seed(1)
            other = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-3)
