"""Models made into machine code by ``torch.compile``: their layers, and the decoding step of ``lean``.

A tiny model on a CPU gains since a step is some fifty operations, each of which costs more to call than to do; a large
one since what lies between matrix products becomes one pass over memory. Compiling takes some ten seconds for each use
of a model; later processes find most of it done in a folder of PyTorch's own.

Sizes that change, such as rows and columns, are symbols in the code, so that it is made once and not for each of them.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

from tropd.pipeline.engines import lean
from tropd.pipeline.models import decoder_layers
from tropd.storage.errors import ConfigError

logger = logging.getLogger(__name__)

# Sizes unlike each other, which the compiler would take for one, and unlike 0 and 1, which it takes for constants.
ROWS, ROOM, LENGTH = 5, 12, 7
# Kinds of use (training, scoring, packed or not, a single row) that one layer may be compiled for.
MOST_VARIANTS = 32


def compile_layers(model: Any) -> None:
    """Have each decoder layer compiled when it is first used; layers of a kind share their code.

    Raises:
        ConfigError: there is no working compiler.
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
        torch.compile(torch.nn.functional.silu)(torch.zeros(3))
    except Exception as error:  # its failures have no class in common
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"runtime.compile is set, but PyTorch cannot compile here: {reason}",
            hint="install a C++ compiler and Python's headers (Debian: g++ python3-dev), or set it to false",
        ) from error


@functools.cache
def _compiled_step() -> Any:
    return torch.compile(lean.next_logits)


def next_logits(model: lean.LeanModel, ids: Tensor, *arguments: Any) -> Tensor:
    """``lean.next_logits``, which ``prepare`` has compiled; not for a single row, nor for prompts of a single token."""
    cache = arguments[2]
    plain = len(ids) == 1 or cache[0][0].shape[2] == 1
    logits: Tensor = (lean.next_logits if plain else _compiled_step())(model, ids, *arguments)
    return logits


def prepare(model: lean.LeanModel) -> None:
    """Compile a model's passes over prompts and over single tokens, in the mode that they will be used in.

    Raises:
        ConfigError: there is no working compiler.
    """
    check_compiler()
    decoder = lean.LeanDecoder(model, LENGTH + ROOM, _traced)
    decoder.start([[0] * LENGTH for _ in range(ROWS)], ROOM)
    decoder.step(torch.zeros(ROWS, dtype=torch.long))


def _traced(model: lean.LeanModel, ids: Tensor, *arguments: Any) -> Tensor:
    """The first use, which says which sizes are symbols."""
    cos, sin, cache, allowed = arguments
    new = [1] if ids.shape[1] > 1 else []
    for tensor in (ids, cos, sin):
        torch._dynamo.mark_dynamic(tensor, [0, *new])
    torch._dynamo.mark_dynamic(allowed, [0, 3] + [2] * len(new))
    for keys, values in cache:
        torch._dynamo.mark_dynamic(keys, [0, 2])
        torch._dynamo.mark_dynamic(values, [0, 2])
    return next_logits(model, ids, *arguments)
