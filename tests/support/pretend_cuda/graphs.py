"""CUDA graphs without CUDA: operations are noted with the tensors that they had, and done again on these.

As on a GPU, nothing is computed while a graph is captured; numbers of the host stay as they were, and Python code does
not run again; what was allocated meanwhile is lost between two replays; all that makes the host wait is refused. The
CPU's tensors will do, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its size, the host has to know.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_dim",
    "unique_consecutive",
}


class Graph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        """Functions, arguments, and the tensors that are new."""

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        self.spoil()
        for function, args, kwargs, fresh in self.operations:
            found = _tensors(function(*args, **kwargs))
            for old, new in zip(fresh, found, strict=True) if fresh else ():
                old.copy_(new)
        self.spoil()

    def spoil(self) -> None:
        """What is in the graph's own memory is lost."""
        for *_, fresh in self.operations:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


class Capture(TorchDispatchMode):
    """As ``torch.cuda.graph``."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        super().__init__()
        self._graph = graph
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._graph.spoil()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if func._can_decompose():
            with _Again(self):
                return func.decompose(*args, **kwargs)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._before += [(tensor, tensor.clone()) for tensor in written]
        result = func(*args, **kwargs)
        is_view = any(one.alias_info is not None for one in func._schema.returns)
        if written or not is_view:
            self._graph.operations.append((func, args, kwargs, [] if written else _tensors(result)))
        return result


class _Again(TorchDispatchMode):
    """The same capture, for the parts of an operation."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._capture.__torch_dispatch__(func, types, args, kwargs)


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, list | tuple) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]
