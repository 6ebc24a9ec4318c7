"""Device, threads, precision and attention masks of any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tropd.pipeline.config.sections.model_settings import RuntimeConfig
from tropd.pipeline.config.sections.value_types import Device
from tropd.pipeline.models.allocator import keep_freed_memory
from tropd.pipeline.models.float32_attention import FLOAT32_SDPA
from tropd.storage.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def configure_runtime(runtime: RuntimeConfig) -> torch.device:
    """Set the thread count, pick the device, and on a CPU keep freed memory.

    Raises:
        ConfigError: CUDA is asked for and not available.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = pick_device(runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def pick_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device is 'cuda', but PyTorch sees no CUDA device",
            hint='install a CUDA build of PyTorch, or set runtime.device = "cpu"',
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[Any]:
    """Switch a model to evaluation mode and back."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def masked_attention(model: Any) -> Iterator[None]:
    """Attention that takes any mask, as a cache and padded rows need; in training the model may have another."""
    own = model.config._attn_implementation
    if own in ("sdpa", "eager", FLOAT32_SDPA):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in ``dtype`` over float32 weights; nothing where ``dtype`` is None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
