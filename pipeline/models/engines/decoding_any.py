"""Decoding with a model's own forward pass, over a cache that is allocated ahead.

Legend: B rows · S columns of the cache · H heads · D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.decoding import ChosenTokens
from tropd.pipeline.models.engines.draw import sample_tokens
from tropd.pipeline.models.engines.graphs.allocated_cache import allocated, is_allocated
from tropd.pipeline.models.engines.graphs.token_graph import GraphUse, TokenGraph
from tropd.pipeline.models.output.output_layer import SplitModel
from tropd.pipeline.models.runtime import to_device

# The cache has room for so many new tokens at first: most responses end long before the limit.
FIRST_STEPS = 256
# Tokens of prompts, padding included, that go through the model at once.
PREFILL_TOKENS = 16384


class ModelDecoder:
    """A ``Decoder`` for any causal LM: rows are left-padded, and all stand at the same column.

    Args:
        split: the same, for its output layer.
        longest: tokens that a row may have, prompt included.
        sampling: how tokens are chosen.
        prefill_tokens: tokens of prompts, padding included, per pass.
        graphs: with them, steps are CUDA graphs.
    """

    def __init__(
        self,
        model: Any,
        split: SplitModel,
        longest: int,
        sampling: Sampling,
        prefill_tokens: int = PREFILL_TOKENS,
        graphs: GraphUse | None = None,
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._split = split
        self._sampling = sampling
        self._graphs = graphs
        self._graph: TokenGraph | None = None
        self._last_position = longest - 1
        self._cache = DynamicCache(config=model.config)
        # State-space models call it otherwise, and their masks are for new tokens only.
        self._is_recurrent = "cache_params" in inspect.signature(model.forward).parameters
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=model.device)
        self._next = torch.zeros(0, dtype=torch.long, device=model.device)
        """``[B]`` positions of the next tokens."""
        self._length = 0
        self._is_padded = True
        self._tokens = self._next
        """``[B]`` the last chosen tokens."""

    def start(self, prompts: Sequence[Sequence[int]], room: int, draws: Tensor) -> ChosenTokens:
        """See ``Decoder.start``."""
        ids, mask = left_pad(prompts, self._next.device)
        width = mask.shape[1]
        self._cache = allocated(self._model.config, width + min(room, FIRST_STEPS))
        self._mask = torch.nn.functional.pad(mask, (0, room), value=1)
        # On a CPU, to look whether anything is padded takes no wait.
        self._is_padded = self._next.device.type == "cpu" or any(len(p) < width for p in prompts)
        self._next = mask.sum(dim=-1)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        # Other kinds of cache may take the prompt at once or token by token only.
        in_parts = is_allocated(self._cache)
        parts = prefill_parts(len(ids), width, self._prefill_tokens if in_parts else ids.numel())
        for columns in parts[:-1]:
            self._read(ids[:, columns], positions[:, columns])
        choice = self._choose(self._read(ids[:, parts[-1]], positions[:, parts[-1]]), draws)
        if self._graphs is not None and self._graphs.works and in_parts:
            self._graph = TokenGraph(self._graphs, self._split, self._cache, self._length)
        return choice

    def step(self, draws: Tensor) -> ChosenTokens:
        """See ``Decoder.step``."""
        # Rows that are done ride along for a while, and may get ahead of the model's last position.
        positions = self._next.clamp(max=self._last_position).unsqueeze(-1)
        self._next = self._next + 1
        ids = self._tokens.unsqueeze(-1)
        logits = None if self._graph is None else self._graph.next_logits(ids, positions, self._mask)
        if logits is None:
            self._graph = None
            logits = self._read(ids, positions)
        else:
            self._length += 1
        return self._choose(logits, draws)

    def select(self, keep: Tensor) -> None:
        """See ``Decoder.select``."""
        if self._graph is not None:
            self._graph.forget()
        # As batch_select_indices, which layers of linear attention do not have.
        self._cache.reorder_cache(keep)
        self._mask, self._next, self._tokens = self._mask[keep], self._next[keep], self._tokens[keep]

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, V]`` after the next tokens ``[B, T]`` of the rows."""
        self._length += ids.shape[1]
        mask = self._mask[:, : self._length]
        if self._is_recurrent:
            return self._split.next_logits(
                input_ids=ids, attention_mask=mask[:, -ids.shape[1] :], cache_params=self._cache
            )
        return self._split.next_logits(
            input_ids=ids,
            attention_mask=mask if self._is_padded else None,
            position_ids=positions,
            past_key_values=self._cache,
        )

    def _choose(self, logits: Tensor, draws: Tensor) -> ChosenTokens:
        choice = sample_tokens(logits, draws, self._sampling)
        self._tokens = choice[0]
        return choice


def prefill_parts(rows: int, width: int, tokens: int) -> list[slice]:
    """Columns of prompts ``[rows, width]`` that are read one part after the other, of at most so many tokens each."""
    size = max(1, tokens // rows)
    return [slice(low, min(low + size, width)) for low in range(0, width, size)]


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 token, 0 padding) ``[len(rows), width of the longest]``."""
    width = max(len(r) for r in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[width - len(tokens) :] = tokens
    mask = (np.arange(width) >= width - np.array([[len(row)] for row in rows])).astype(np.int64)
    return to_device(ids, device), to_device(mask, device)
