"""A decoding step as a CUDA graph: the kernels of a model's pass over one token per row, launched at once.

One by one, launching them takes the host longer than they take the GPU. A graph repeats them on the same memory, so all
that changes from token to token lies in tensors that stay where they are: ids, positions, the column of the cache that
is written, which also says the columns that may be looked at. What the host decides, rows and columns, is decided when a
graph is made: whenever rows leave, and every ``COLUMNS`` tokens. A graph is of one batch and no longer; so it sees
the weights of its time, and keeps no memory for later.

The pass is the model's own, in the precision that the caller has chosen. Drawing a token from its logits is not part of
it. PyTorch: docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

Legend: B rows · S columns of the cache that a graph attends to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tropd.pipeline.models.output.output_layer import SplitModel

logger = logging.getLogger(__name__)

# S is a multiple of it: every token attends to half of it in vain, and so often a graph is made anew.
COLUMNS = 512
# In the proof, so that a few tokens take several graphs.
FEW_COLUMNS = 4


@dataclass
class GraphUse:
    """Whether an engine makes graphs; the first that fails is the last."""

    name: str
    """Of the model, for the log."""
    device: torch.device
    columns: int = COLUMNS
    works: bool = True
    replays: int = 0
    """Steps that were graphs, so far."""
    streams: list[Any] = field(default_factory=list)
    """The one in which graphs are made: each stream has work space of its own for matrix products."""

    def stream(self) -> Any:
        if not self.streams:
            self.streams.append(torch.cuda.Stream(self.device))
        return self.streams[0]

    def give_up(self, reason: object) -> None:
        """Decode without graphs from now on."""
        self.works = False
        first = next(iter(str(reason).splitlines()), "") or type(reason).__name__
        logger.info("%s decodes without CUDA graphs: %s", self.name, first)

    @contextmanager
    def short(self) -> Iterator[None]:
        """Graphs of few columns, while the block runs."""
        usual, self.columns = self.columns, FEW_COLUMNS
        try:
            yield
        finally:
            self.columns = usual


class TokenGraph:
    """Passes over single tokens of a batch of rows that have been read.

    Args:
        cache: whose layers are all allocated ahead.
        length: its columns that are written.
    """

    def __init__(self, use: GraphUse, split: SplitModel, cache: DynamicCache, length: int) -> None:
        self._use, self._split, self._cache = use, split, cache
        self._layers: list[Any] = cache.layers
        self._length = length
        self._inputs: StaticInputs | None = None
        self._graph: Any = None
        self._is_current = False
        """Whether the graph is that of the inputs; otherwise it only holds the memory that the next one will take."""

    def next_logits(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor | None:
        """Float32 logits ``[B, tokens]`` after one more token per row, valid until the next call; None once it fails:
        then the cache is as before.

        Args:
            ids: ``[B, 1]``, at ``positions`` ``[B, 1]``.
            mask: ``[B, ·]`` 1 where a column is not padding; as wide as the cache will ever be.
        """
        try:
            return self._next_logits(ids, positions, mask)
        except Exception as error:  # GPUs, drivers and versions fail in any way
            self._use.give_up(error)
            self.forget()
            for layer in self._layers:
                layer.expose(self._length)
            return None

    def forget(self) -> None:
        """Rows leave: the cache will have other memory."""
        self._inputs, self._is_current = None, False

    def _next_logits(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        length = self._length + 1
        if length > self._layers[0].capacity:
            self.forget()
            for layer in self._layers:
                layer.expose(self._length)
                layer.reserve(length)
        columns = -(-length // self._use.columns) * self._use.columns
        columns = min(columns, self._layers[0].capacity, mask.shape[1])
        if self._inputs is None or self._inputs.columns != columns:
            self.forget()
            self._inputs = StaticInputs(
                torch.empty_like(ids), torch.empty_like(positions), ids.new_zeros(1), mask[:, :columns].bool()
            )
            self._inputs.write(ids, positions, self._length)
            logits = self._first(self._inputs)
        else:
            self._inputs.write(ids, positions, self._length)
            if not self._is_current:
                self._capture(self._inputs)
            self._graph.replay()
            self._use.replays += 1
            assert self._inputs.logits is not None
            logits = self._inputs.logits
        self._length = length
        return logits

    def _first(self, inputs: StaticInputs) -> Tensor:
        """The pass without a graph, in the stream that it will be made in: libraries get ready there."""
        stream, here = self._use.stream(), torch.cuda.current_stream(self._use.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            logits = self._pass(inputs)
        here.wait_stream(stream)
        inputs.logits = torch.empty_like(logits)
        return inputs.logits.copy_(logits)

    def _capture(self, inputs: StaticInputs) -> None:
        stream, here = self._use.stream(), torch.cuda.current_stream(self._use.device)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._graph is None else self._graph.pool()
        assert inputs.logits is not None
        stream.wait_stream(here)
        # The outer block brings the caller's stream back where the inner one fails. Other threads may go on meanwhile.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            inputs.logits.copy_(self._pass(inputs))
        here.wait_stream(stream)
        self._graph, self._is_current = graph, True

    def _pass(self, inputs: StaticInputs) -> Tensor:
        for layer in self._layers:
            layer.place = (inputs.column, inputs.columns)
        try:
            return self._split.next_logits(
                input_ids=inputs.ids,
                attention_mask=inputs.allowed(),
                position_ids=inputs.positions,
                past_key_values=self._cache,
            )
        finally:
            for layer in self._layers:
                layer.place = None


@dataclass
class StaticInputs:
    """What a graph reads and writes, besides weights and cache."""

    ids: Tensor
    positions: Tensor
    column: Tensor
    """``[1]`` the column that is written."""
    mask: Tensor
    """``[B, S]`` True where a column is not padding."""
    logits: Tensor | None = None
    """``[B, tokens]`` the outcome, once its size is known."""

    @property
    def columns(self) -> int:
        return self.mask.shape[1]

    def write(self, ids: Tensor, positions: Tensor, column: int) -> None:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.column.fill_(column)

    def allowed(self) -> Tensor:
        """``[B, 1, 1, S]`` the columns that may be looked at: those of tokens, up to the one that is written."""
        written = torch.arange(self.columns, device=self.mask.device) <= self.column
        return (self.mask & written)[:, None, None, :]
