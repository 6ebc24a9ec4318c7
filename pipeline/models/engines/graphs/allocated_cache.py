"""A cache that is allocated ahead. Legend: B rows · S columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class AllocatedLayer(DynamicLayer):
    """A cache layer that writes into a buffer, doubled when it is full; DynamicLayer would copy at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        """Columns of the buffer."""
        self.place: tuple[Tensor, int] | None = None
        """Where the next token goes and how many columns are given out, where neither may be a number of the host's: a
        column ``[1]`` int64, and S. None: after the last, and all up to it."""
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, heads, new, D]``; returns those of all columns so far, or of S."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Zeros: what is not written yet has no weight in attention, but 0 · NaN would be NaN.
            self._buffers = [
                states.new_zeros((*states.shape[:2], self.capacity, states.shape[-1]))
                for states in (key_states, value_states)
            ]
        if self.place is not None:
            column, columns = self.place
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, column, states)
            keys, values = (buffer[:, :, :columns] for buffer in self._buffers)
            return keys, values
        end = self._length + key_states.shape[-2]
        self.reserve(end)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self.expose(end)
        return self.keys, self.values

    def reserve(self, columns: int) -> None:
        """Have room for so many columns; the memory is another one if it has not."""
        if columns > self.capacity:
            self.capacity = max(columns, 2 * self.capacity)
            self._buffers = [_grown(buffer, self.capacity) for buffer in self._buffers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._buffers = [buffer[beam_idx] for buffer in self._buffers]
        self.expose(self._length)

    def expose(self, length: int) -> None:
        """Say how many columns are written."""
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    larger = buffer.new_zeros((*buffer.shape[:2], capacity, buffer.shape[3]))
    larger[:, :, : buffer.shape[2]] = buffer
    return larger


def allocated(config: Any, capacity: int) -> DynamicCache:
    """The model's own kind of cache; plain full-attention layers get a buffer."""
    cache = DynamicCache(config=config)
    cache.layers = [AllocatedLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def is_allocated(cache: DynamicCache) -> bool:
    """True if all layers have a buffer."""
    return all(type(layer) is AllocatedLayer for layer in cache.layers)
