"""The optimizer: AdamW, whose weight decay is for matrices only, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from tropd.pipeline.config.sections.training_settings import TrainConfig


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters, those that are not decayed in a group of their own.

    Its state is found by parameter (see ``checkpoint``), not by group. On GPUs its step is one kernel.
    """
    spared = undecayed(model)
    groups: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter in spared].append(parameter)
    decays = (config.weight_decay, 0.0)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(groups, decays, strict=True)
            if group
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=all(parameter.device.type == "cuda" for group in groups for parameter in group),
    )


def undecayed(model: Any) -> set[torch.nn.Parameter]:
    """Parameters that weight decay would only harm: of norms, biases, and embeddings (with an output layer that is tied).

    A matrix can shrink without changing the model's output where a norm follows; a norm's scale, a bias or the
    vector of a token that a step does not see cannot.
    """
    found = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or name.endswith("bias") or getattr(parameter, "_no_weight_decay", False)
    }
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or "Norm" in type(module).__name__:
            found |= set(module.parameters(recurse=False))
    return found


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of the step with this number (from 0): linear warm-up, then the schedule down to 0."""
    warmup = config.warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate
