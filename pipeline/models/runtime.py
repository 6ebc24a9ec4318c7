"""Device, threads, precision and attention masks of any model; arrays to the device and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tropd.pipeline.config.sections.model_settings import RuntimeConfig
from tropd.pipeline.config.sections.value_types import Device
from tropd.pipeline.models.allocator import keep_freed_memory
from tropd.pipeline.models.attention.float32_attention import FLOAT32_SDPA
from tropd.storage.errors import ConfigError

Side = Literal["left", "right"]
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
    if own in ("sdpa", "eager", FLOAT32_SDPA, *(name for name, _ in ON_GPU.values())):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _unread(*sizes: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """``sdpa_mask`` that does not look whether anything is padded: for that, the host would wait for the GPU."""
    if attention_mask is not None:
        options["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*sizes, attention_mask=attention_mask, **options)
    return mask


def _causal(*sizes: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """``sdpa_mask`` of rows that are padded on the right: none of their tokens looks at what comes after it."""
    mask: Tensor | None = sdpa_mask(*sizes, attention_mask=None, **options)
    return mask


ON_GPU: dict[Side, Any] = {"left": ("tropd_sdpa_left", _unread), "right": ("tropd_sdpa_right", _causal)}


@contextmanager
def padded_rows(model: Any, side: Side) -> Iterator[None]:
    """Rows are padded on this side while the block runs: on a GPU, a model that attends with PyTorch's scaled dot product
    then makes its masks without a look at the padding, and on the right without any."""
    own = model.config._attn_implementation
    if model.device.type != "cuda" or own != "sdpa":
        yield
        return
    name, mask = ON_GPU[side]
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in ``dtype`` over float32 weights; nothing where ``dtype`` is None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@functools.cache
def gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU."""
    return int(torch.cuda.mem_get_info(device)[1])


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor there, of the same type. It goes to a GPU from pinned memory, in the order of the work there:
    otherwise the host would wait until all that was begun before is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Tensors of one device as arrays, detached. The host waits once for all of them."""
    copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]
    if tensors and tensors[0].device.type == "cuda":
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
