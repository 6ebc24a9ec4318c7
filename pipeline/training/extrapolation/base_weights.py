"""The weights that a run extrapolates from: θ_base, beside the student's θ.

Copies in the parameters' precision (float32) where the parameters are, sharded as they are. Only trained parameters, so
of a student with adapters these alone: A and B are stretched, not their product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tropd.storage.errors import ConfigError

PREFIX = "extrapolation."
"""Of the names of its tensors in a checkpoint."""


class BaseWeights:
    """θ_base of the parameters that are extrapolated, at first the student's own.

    Args:
        model: the student, sharded already if it is to be.
        parts: of names (in lower case); a parameter with one of them in its name takes part.

    Raises:
        ConfigError: no trained parameter has such a name.
    """

    def __init__(self, model: Any, parts: Sequence[str]) -> None:
        self._parameters: dict[str, torch.nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and any(part in name.lower() for part in parts)
        }
        if not self._parameters:
            some = next((name for name, p in model.named_parameters() if p.requires_grad), "none")
            raise ConfigError(
                f"objective.extrapolation.parameters = {list(parts)}: no trained parameter of the student has one of "
                f"these in its name (one is called {some})",
                hint="set objective.extrapolation.parameters to parts of the names of its layers",
            )
        self._base = self.copies()

    @torch.no_grad()
    def stretch(self, factor: float) -> None:
        """θ ← θ + factor·(θ - θ_base)."""
        for name, parameter in self._parameters.items():
            parameter.add_(parameter - self._base[name], alpha=factor)

    @torch.no_grad()
    def follow(self) -> None:
        """θ_base ← θ."""
        for name, parameter in self._parameters.items():
            self._base[name].copy_(parameter)

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies of θ by name."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def keep(self, copies: Mapping[str, torch.Tensor]) -> None:
        """Bring copies up to θ."""
        for name, parameter in self._parameters.items():
            copies[name].copy_(parameter)

    @torch.no_grad()
    def restore(self, copies: Mapping[str, torch.Tensor]) -> None:
        """θ ← copies, bit for bit."""
        for name, parameter in self._parameters.items():
            parameter.copy_(copies[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """θ_base, by the names that it has in a checkpoint."""
        return {f"{PREFIX}{name}": value for name, value in self._base.items()}
