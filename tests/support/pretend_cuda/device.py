"""Tensors of the pretended device, and the operations on them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from pretend_cuda.graphs import WAITING, Capture, Graph
from pretend_cuda.record import Record, where

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Products of two lower precisions whose sums come out in float32: CPUs have none.
WIDE_PRODUCTS = [overload for overload in [getattr(aten.mm, "dtype", None)] if overload is not None]

_record = Record()


class DeviceTensor(torch.Tensor):
    """A tensor that says ``cuda:0``; its values are in ``inner``."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
            requires_grad=False,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, DeviceTensor) else value


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
    return DeviceTensor(value) if plain else value


def _leaves(value: Any) -> list[Any]:
    """All that is in lists, tuples and dictionaries of arguments."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    found = []
    for one in value:
        if isinstance(one, dict | list | tuple):
            found += _leaves(one)
        else:
            found.append(one)
    return found


def _mapped(function: Any, value: Any) -> Any:
    """The same lists, tuples and dictionaries of other values."""
    if isinstance(value, dict):
        return {name: _mapped(function, one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, one) for one in value)
    return function(value)


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


@functools.cache
def _kind(func: Any) -> tuple[str, bool, bool]:
    """Of an operation: its name, whether it is made of others, and whether it returns what it is given."""
    name = func.name().split("::")[1].split(".")[0]
    aliases = any(a.alias_info is not None for a in [*func._schema.arguments, *func._schema.returns])
    return name, func._can_decompose(), aliases


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, is_made_of_others, aliases = _kind(func)
    if is_made_of_others:  # these come whole in inference mode
        with _Factories():
            return func.decompose(*args, **kwargs)
    _record.operations[name] += 1
    if name in ("_to_copy", "copy_"):
        return _copied(func, name, args, kwargs)
    leaves = _leaves((args, kwargs))
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    here = any(isinstance(a, DeviceTensor) for a in tensors)
    if here:
        _refuse_two_devices(name, args, tensors)
        _note_waits(name, args, kwargs)
    named = [d for d in leaves if isinstance(d, torch.device)]
    result = _computed(func, _mapped(_inner, args), _mapped(_inner, kwargs))
    if name == "_local_scalar_dense" or not (any(map(_on_device, named)) if named else here):
        return result
    if result is None:
        return None
    result = _mapped(_wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if aliases and here else result


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if func in WIDE_PRODUCTS:
        return torch.mm(args[0].float(), args[1].float())
    return func(*args, **kwargs)


def _copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """A conversion or a copy, which may go from one device to the other."""
    source = args[1] if name == "copy_" else args[0]
    comes = isinstance(source, DeviceTensor)
    if name == "copy_":
        goes = isinstance(args[0], DeviceTensor)
    else:
        target = kwargs.get("device")
        goes = comes if target is None else _on_device(target)
    if comes != goes:
        _note_copy(
            source, comes, bool(kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        )
    if name == "copy_":
        _inner(args[0]).copy_(_inner(source))
        return args[0]
    options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    result = func(_inner(source), **options)
    return DeviceTensor(result) if goes else result


def _note_copy(source: torch.Tensor, to_host: bool, non_blocking: bool) -> None:
    """A copy in a stream's order needs no wait if the host's memory is pinned, as it is in copies to the host."""
    if not source.numel():
        return
    if not non_blocking:
        _record.wait("a copy to the host" if to_host else "a copy to the device")
    elif not to_host and source.dim() and not getattr(source, "is_pretended_pinned", False):
        _record.wait("a copy of pageable memory to the device")


def _refuse_two_devices(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """As kernels do; single numbers may be the host's, and so may an index, which is copied."""
    strangers = [a for a in tensors if not isinstance(a, DeviceTensor) and a.dim()]
    if name in INDEXING:
        indices = [i for i in _leaves(args[1]) if isinstance(i, torch.Tensor)]
        strangers = [s for s in strangers if not any(s is i for i in indices)]
        if any(not isinstance(i, DeviceTensor) for i in indices):
            _record.wait("an index of the host's")
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} at {where()} has a CPU tensor"
        )


def _note_waits(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in WAITING:
        _record.wait(name)
    if name in INDEXING and any(
        isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in _leaves(args[1])
    ):
        _record.wait("an index that is a mask")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _record.wait("repeat_interleave of unknown size")


class _Factories(TorchDispatchMode):
    """Tensors that are made on ``cuda`` are of the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = _leaves((args, kwargs))
        if any(
            isinstance(x, DeviceTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves
        ):
            return _dispatch(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """What does not come as an operation: memory that is pinned, numpy, and attention, which chooses a kernel before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is torch.Tensor.backward:  # layers that are computed again attend again
            with _Functions():
                return _engine_run_backward(
                    (args[0],), (torch.ones_like(args[0]),), False, False, (), True, accumulate_grad=True
                )
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        if func is torch.Tensor.numpy and isinstance(args[0], DeviceTensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {where()}")
        if func in (torch.Tensor.to, torch.Tensor.cuda):
            args, kwargs = _numbered(args), _numbered(kwargs)
        elif kwargs.get("device") is not None:
            kwargs = _numbered(kwargs)
        return func(*args, **kwargs)


def _numbered(value: Any) -> Any:
    """'cuda' as 'cuda:0': the current device is not asked for."""
    if isinstance(value, dict):
        return {k: _numbered(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_numbered(v) for v in value)
    if isinstance(value, torch.device | str) and str(value) == "cuda":
        return CUDA
    return value


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The formula of ``scaled_dot_product_attention``; a token that looks at nothing gets 0, as from its kernels."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention at {where()}: {query.dtype}, {key.dtype}, {value.dtype}")
    _record.operations["attention with a mask" if attn_mask is not None else "attention without a mask"] += 1
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    with torch.autocast(device, enabled=False):
        scores = (query.float() @ key.float().transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return (scores.softmax(-1).nan_to_num() @ value.float()).to(query.dtype)


class _Stream:
    """A stream, or an event in one: of all that they do, the host waits for ``synchronize`` only."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        _record.wait("synchronize")

    def record_event(self, *_: Any) -> _Stream:
        return _Stream()

    def wait_stream(self, *_: Any) -> None: ...

    wait_event = record = wait = wait_stream


_CUDA_FUNCTIONS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "current_stream": lambda *_: _Stream(),
    "Stream": _Stream,
    "Event": _Stream,
    "stream": _Stream,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: _record.wait("synchronize"),
    "mem_get_info": lambda *_: (80 << 30, 80 << 30),
    "CUDAGraph": Graph,
    "graph": Capture,
}


@contextlib.contextmanager
def pretend(record: Record | None = None) -> Iterator[Record]:
    """While the block runs, ``cuda`` is the pretended device; its waits go into the record."""
    global _record
    before, _record = _record, record or Record()
    saved = {name: getattr(torch.cuda, name) for name in _CUDA_FUNCTIONS}
    lifts = torch._C._only_lift_cpu_tensors()
    for name, function in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Functions(), _Factories():
            yield _record
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        for name, function in saved.items():
            setattr(torch.cuda, name, function)
        _record = before


def moved(module: Any) -> Any:
    """The module with its parameters and buffers on the pretended device; shared ones stay shared."""
    seen: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in seen:
                seen[id(parameter)] = torch.nn.Parameter(
                    DeviceTensor(parameter.detach().clone()), requires_grad=parameter.requires_grad
                )
            setattr(part, name, seen[id(parameter)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, DeviceTensor(buffer.detach().clone()))
    return module
