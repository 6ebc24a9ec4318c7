"""Models compiled by ``torch.compile``: their layers, and the decoding step of ``lean_decoder``.

A tiny model on a CPU gains since a step is some fifty operations, each of which costs more to call than to do; a large
one since the work between matrix products becomes one pass over memory. Compiling takes some ten seconds for each use
of a model; later processes find most of it done in a folder of PyTorch's own.

Sizes that change, such as rows and columns, are symbols in the code, so that it is made once and not for each of them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.decoding import ChosenTokens
from tropd.pipeline.models.engines.lean import lean_decoder
from tropd.pipeline.models.loading import decoder_layers
from tropd.storage.errors import ConfigError

logger = logging.getLogger(__name__)

# Sizes unlike each other, which the compiler would take for one, and unlike 0 and 1, which it takes for constants.
ROWS, ROOM, LENGTH = 5, 12, 7
# Of decoding. Small tensors are written rather than recomputed at each use, such as queries for each column
# of the cache; and the code that calls the kernels is machine code too.
OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 3, "cpp_wrapper": True}
# Kinds of use (training, scoring, packed or not, a single row) that one layer, or decoding, may be compiled for.
MOST_VARIANTS = 32


def compile_layers(model: Any) -> None:
    """Have each decoder layer compiled when it is first used; layers of a kind share their code.

    Raises:
        ConfigError: no compiler works here.
    """
    layers = decoder_layers(model)
    if not layers:
        logger.info("%s names no decoder layers: it is not compiled", type(model).__name__)
        return
    check_compiler()
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    for layer in layers:
        layer.compile(dynamic=True)


@functools.cache
def check_compiler() -> None:
    """Try the compiler on next to nothing.

    Raises:
        ConfigError: it does not work.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        logger.warning(
            "runtime.compile does nothing in this process: TORCHDYNAMO_DISABLE is set, by you or for vLLM on a CPU"
        )
    try:
        torch.compile(torch.nn.functional.silu, options=OPTIONS)(torch.zeros(3))
    except Exception as error:  # its failures have no class in common
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"runtime.compile is set, but PyTorch cannot compile here: {reason}",
            hint="install a C++ compiler and Python's headers (Debian: g++ python3-dev), or set it to false",
        ) from error


def _is_checked(guards: Sequence[Any]) -> list[bool]:
    """The parts of a call that are compared with those of the compiled code: its tensors, and ``key`` for the weights.

    To compare all weights, and all functions that are called, took a tenth of a small model's step.
    """
    return [not (guard.is_global or guard.name.startswith("model.")) for guard in guards]


def _choose(
    key: str, sampling: Sampling, draws: Tensor, model: lean_decoder.LeanModel, *arguments: Any
) -> ChosenTokens:
    if not key:  # used values are compared at each call; an assertion would not be under `python -O`
        raise ValueError("a model without a key")
    return lean_decoder.choose(sampling, draws, model, *arguments)


@functools.cache
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    return torch.compile(_choose, options={**OPTIONS, "guard_filter_fn": _is_checked})


def choose_compiled(
    sampling: Sampling,
    draws: Tensor,
    model: lean_decoder.LeanModel,
    angles: Tensor,
    ids: Tensor,
    *arguments: Any,
) -> ChosenTokens:
    """``lean_decoder.choose``, compiled by ``prepare``; not for a single row, nor for prompts of a single token."""
    cache = arguments[1]
    if len(ids) == 1 or cache[0].shape[3] == 1:
        return lean_decoder.choose(sampling, draws, model, angles, ids, *arguments)
    choice: ChosenTokens = _compiled()(model.key, sampling, draws, model, angles, ids, *arguments)
    return choice


def compile_choice(model: lean_decoder.LeanModel, sampling: Sampling) -> None:
    """Compile a model's passes over prompts and over single tokens, in the mode that they will be used in."""
    decoder = lean_decoder.LeanDecoder(model, LENGTH + ROOM, sampling, _traced)
    draws = torch.zeros(ROWS + 1, dtype=torch.float64)
    decoder.start([[0] * LENGTH for _ in draws], ROOM, draws)
    decoder.select(torch.arange(ROWS))  # from now on rows are fewer than the cache has room for
    decoder.step(draws[:ROWS])


def _traced(
    sampling: Sampling,
    draws: Tensor,
    model: lean_decoder.LeanModel,
    angles: Tensor,
    ids: Tensor,
    *arguments: Any,
) -> ChosenTokens:
    """The first use, which says which sizes are symbols."""
    positions, cache, allowed = arguments
    new = [1] if ids.shape[1] > 1 else []
    for tensor in (draws, angles):
        torch._dynamo.mark_dynamic(tensor, [0])
    for tensor in (ids, positions):
        torch._dynamo.mark_dynamic(tensor, [0, *new])
    torch._dynamo.mark_dynamic(allowed, [0, 3] + [2] * len(new))
    for layer in cache:
        torch._dynamo.mark_dynamic(layer, [1, 3])
    return choose_compiled(sampling, draws, model, angles, ids, *arguments)
