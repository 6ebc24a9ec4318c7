"""The stages of a run and what they are made of. Prints nothing; progress goes through ``Reporter``.

``distill`` and ``open_run`` are the door for programs and notebooks. They are loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tropd.pipeline.experiments.api import Distillation, distill, open_run

__all__ = ["Distillation", "distill", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tropd.pipeline.experiments import api

    return getattr(api, name)
