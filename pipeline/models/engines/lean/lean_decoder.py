"""Decoding of well-known plain architectures on a CPU, without the overhead of modules.

A step of a tiny model costs its framework, not its arithmetic: transformers runs some 40 Python calls per layer. Llama,
Mistral, Qwen2 and Qwen3 (RMS norm, rotary positions, grouped queries, gated SiLU) are a dozen operations per layer, done
here on the model's own weights. ``is_lean`` compares with the model itself before it is trusted; whatever differs is
left to transformers. The products within layers are in the precision of the weights or in a lower one; norms,
attention, the output layer and the sums from layer to layer are float32.

Legend: B rows · T new tokens · S tokens so far · H hidden size · D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import SiLUActivation

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.decoding import ChosenTokens
from tropd.pipeline.models.engines.decoding_any import (
    FIRST_STEPS,
    PREFILL_TOKENS,
    left_pad,
    prefill_parts,
)
from tropd.pipeline.models.engines.draw import sample_tokens
from tropd.pipeline.models.engines.lean.packed import linear, packed

logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary positions whose angles do not depend on how long the sequence is.
ROTARY = ("default", "linear", "llama3", "yarn")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Differences to the model itself, as shares of its largest logit, that rounding explains."""

Forward = Callable[..., ChosenTokens]


@dataclass(frozen=True)
class _Layer:
    """A layer's weights. The projections of queries, keys and values are one matrix, and so are gate and up; a norm's
    weights are part of the matrix that comes after it, where that is float32. In a lower precision the matrix would be
    rounded to other numbers than those that are trained."""

    qkv: Tensor
    qkv_norm: Tensor | None
    """``[H]`` float32 weights of the norm before it, where they are no part of it; likewise below."""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """``[heads + kv_heads, 1, D]``: queries and keys are normalized and rotated together."""
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_norm: Tensor | None
    down: Tensor


class LeanModel:
    """The weights of a model as they are now, ready for decoding. Made anew after each update of the weights.

    Args:
        model: a causal LM of transformers.
        dtype: of the products within layers; that of the weights where it is None.
        limit: rows of the output layer from this one on are no tokens; None where all are.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None = None, limit: int | None = None) -> None:
        config, inner = model.config, model.model
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = config.rms_norm_eps
        self.embedding = inner.embed_tokens.weight
        self.head = model.lm_head.weight[:limit].float() * inner.norm.weight
        self.rotary = inner.rotary_emb
        self.layers = [self._layer(layer, dtype or model.dtype) for layer in inner.layers]

    @functools.cached_property
    def key(self) -> str:
        """Equal for models that differ in the values of their weights only."""
        weights = [self.embedding, self.head, *(w for layer in self.layers for w in vars(layer).values())]
        kinds = [w if w is None else (w.shape, w.stride(), w.dtype) for w in weights]
        return str((self.heads, self.kv_heads, self.head_dim, self.eps, kinds))

    def pack(self) -> Self:
        """Have large matrices ordered for products with few rows (see ``packed``); not for compiled code."""
        self.head = packed(self.head)
        for place, layer in enumerate(self.layers):
            matrices = {name: packed(getattr(layer, name)) for name in ("qkv", "out", "gate_up", "down")}
            self.layers[place] = replace(layer, **matrices)
        return self

    def angles(self, length: int) -> Tensor:
        """Cosines and sines ``[length, 2, D]`` of the rotary positions; sines with the sign that ``_rotated`` wants."""
        positions = torch.arange(length, device=self.embedding.device).unsqueeze(0)
        cos, sin = self.rotary(self.embedding.new_empty(0, dtype=torch.float32), positions)
        half = self.head_dim // 2
        return torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)], dim=1)

    def _layer(self, layer: Any, dtype: torch.dtype) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in projections]
        norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
        qk_norm = None
        if norms[0] is not None and norms[1] is not None:
            q_norm, k_norm = norms[0].expand(self.heads, -1), norms[1].expand(self.kv_heads, -1)
            qk_norm = torch.cat([q_norm, k_norm]).unsqueeze(1).float()
        qkv, qkv_norm = _with_norm([p.weight for p in projections], layer.input_layernorm.weight, dtype)
        gate_up, gate_up_norm = _with_norm(
            [mlp.gate_proj.weight, mlp.up_proj.weight], layer.post_attention_layernorm.weight, dtype
        )
        out_bias = attention.o_proj.bias
        return _Layer(
            qkv=qkv,
            qkv_norm=qkv_norm,
            qkv_bias=None if biases[0] is None else torch.cat(biases).to(dtype),
            qk_norm=qk_norm,
            out=attention.o_proj.weight.to(dtype),
            out_bias=None if out_bias is None else out_bias.to(dtype),
            gate_up=gate_up,
            gate_up_norm=gate_up_norm,
            down=mlp.down_proj.weight.to(dtype),
        )


def _with_norm(weights: Sequence[Tensor], norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Matrices as one, with the weights of the norm before it in it or beside it."""
    if dtype == torch.float32:
        return torch.cat(tuple(weights)) * norm, None
    return torch.cat([weight.to(dtype) for weight in weights]), norm.float()


class LeanDecoder:
    """A ``Decoder`` of plain architectures: rows are left-padded, and all stand at the same column.

    Args:
        longest: tokens that a row may have, prompt included.
        sampling: how tokens are chosen.
        forward: ``choose``, or its compiled form, which is always given a mask.
        prefill_tokens: tokens of prompts, padding included, per pass.
    """

    def __init__(
        self,
        model: LeanModel,
        longest: int,
        sampling: Sampling,
        forward: Forward | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._sampling = sampling
        self._is_compiled = forward is not None
        self._forward = forward or choose
        self._angles = model.angles(longest)
        self._cache: list[Tensor] = []
        """Keys and values ``[2, B, kv_heads, capacity, D]`` of each layer."""
        self._allowed: Tensor | None = None
        """``[B, 1, 1, width + room]`` True where a column is not padding; None where nothing is padded."""
        self._next = torch.zeros(0, dtype=torch.long, device=model.embedding.device)
        """``[B]`` positions of the next tokens."""
        self._tokens = self._next
        """``[B]`` the last chosen tokens."""
        self._length = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that it keeps."""
        return sum(layer.nbytes for layer in self._cache)

    def start(self, prompts: Sequence[Sequence[int]], room: int, draws: Tensor) -> ChosenTokens:
        """See ``Decoder.start``."""
        model = self._model
        ids, mask = left_pad(prompts, self._next.device)
        rows, width = mask.shape
        # Keep one spare column so the slice is never contiguous: a contiguous buffer would trigger another compile.
        shape = (2, rows, model.kv_heads, width + min(room, FIRST_STEPS) + 1, model.head_dim)
        self._cache = [model.embedding.new_empty(shape, dtype=torch.float32) for _ in model.layers]
        self._next = mask.sum(dim=-1)
        self._allowed = None
        if self._is_compiled or not bool(mask.all()):
            self._allowed = functional.pad(mask.bool(), (0, room), value=True)[:, None, None, :]
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        for columns in prefill_parts(rows, width, self._prefill_tokens):
            self._length = columns.stop
            allowed = _causal(mask[:, : columns.stop], columns.start)
            choice = self._choose(ids[:, columns], positions[:, columns], allowed, draws)
        return choice

    def step(self, draws: Tensor) -> ChosenTokens:
        """See ``Decoder.step``."""
        self._length += 1
        if self._length == self._cache[0].shape[3]:
            self._cache = [_doubled(layer) for layer in self._cache]
        # Rows that are done ride along for a while, and may get ahead of the table.
        positions = self._next.clamp(max=len(self._angles) - 1).unsqueeze(-1)
        self._next = self._next + 1
        allowed = None if self._allowed is None else self._allowed[..., : self._length]
        return self._choose(self._tokens.unsqueeze(-1), positions, allowed, draws)

    def select(self, keep: Tensor) -> None:
        """See ``Decoder.select``."""
        # Most rows stay where they are (see ``decode``): only the others are copied.
        moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero().squeeze(-1)
        if len(moved):
            source = keep[moved]
            for layer in self._columns():
                layer[:, moved] = layer[:, source]
        self._cache = [layer[:, : len(keep)] for layer in self._cache]
        self._allowed = None if self._allowed is None else self._allowed[keep]
        self._next, self._tokens = self._next[keep], self._tokens[keep]

    def _choose(self, ids: Tensor, positions: Tensor, allowed: Tensor | None, draws: Tensor) -> ChosenTokens:
        choice = self._forward(
            self._sampling, draws, self._model, self._angles, ids, positions, self._columns(), allowed
        )
        self._tokens = choice[0]
        return choice

    def _columns(self) -> list[Tensor]:
        """The columns in use."""
        return [layer[..., : self._length, :] for layer in self._cache]


def _doubled(cache: Tensor) -> Tensor:
    capacity = cache.shape[3]
    larger = cache.new_empty((*cache.shape[:3], 2 * capacity, cache.shape[4]))
    larger[..., :capacity, :] = cache
    return larger


def choose(sampling: Sampling, draws: Tensor, *arguments: Any) -> ChosenTokens:
    """The rows' next tokens, drawn from ``next_logits`` of the other arguments."""
    return sample_tokens(next_logits(*arguments), draws, sampling)


def next_logits(
    model: LeanModel,
    angles: Tensor,
    ids: Tensor,
    positions: Tensor,
    cache: Sequence[Tensor],
    allowed: Tensor | None,
) -> Tensor:
    """Float32 logits ``[B, V]`` of the last of the new tokens.

    Args:
        angles: ``[·, 2, D]``, see ``LeanModel.angles``.
        ids: ``[B, T]`` new tokens, at ``positions`` ``[B, T]`` of their rows.
        cache: ``[2, B, kv_heads, S, D]`` keys and values of each layer. The last T columns are those of the new tokens,
            and are written here.
        allowed: ``[B, 1, T, S]`` (or with 1 for T) the columns that may be looked at; all where it is None.
    """
    rows, new = ids.shape
    x = functional.embedding(ids, model.embedding).float()
    cos, sin = angles[positions].unsqueeze(1).unbind(dim=3)
    for layer, columns in zip(model.layers, cache, strict=True):
        h = _normed(x, model.eps, layer.qkv_norm)
        qkv = _linear(h, layer.qkv, layer.qkv_bias).view(rows, new, -1, model.head_dim)
        qk, v = qkv.transpose(1, 2).split((model.heads + model.kv_heads, model.kv_heads), dim=1)
        if layer.qk_norm is not None:
            qk = _normed(qk, model.eps) * layer.qk_norm
        q, k = _rotated(qk, cos, sin).split((model.heads, model.kv_heads), dim=1)
        columns[..., -new:, :] = torch.stack([k, v])
        attended = _attended(q, columns[0], columns[1], allowed)
        x = x + _linear(attended.transpose(1, 2).reshape(rows, new, -1), layer.out, layer.out_bias)
        h = _normed(x, model.eps, layer.gate_up_norm)
        gate, up = _linear(h, layer.gate_up).chunk(2, dim=-1)
        x = x + _linear(functional.silu(gate) * up, layer.down)
    return _linear(_normed(x[:, -1], model.eps), model.head)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Float32, from a product in the precision of the weights."""
    return linear(x.to(weight.dtype), weight, bias).float()


def _normed(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """RMS norm, without weights where they are elsewhere."""
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def _attended(q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention ``[B, heads, T, D]``. One new token per row is two small products, for which SDPA's kernel is slow."""
    if q.shape[2] > 1:
        grouped = q.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=allowed, enable_gqa=grouped)
    rows, heads, _, size = q.shape
    scaled = q.reshape(rows, keys.shape[1], -1, size) * size**-0.5
    scores = torch.matmul(scaled, keys.transpose(-1, -2))
    if allowed is not None:
        scores.masked_fill_(~allowed, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), values).view(rows, heads, 1, size)


def _causal(mask: Tensor, first: int) -> Tensor:
    """``[B, 1, T - first, T]`` what the tokens from ``first`` on of left-padded prompts look at: themselves, and all
    before them."""
    size = mask.shape[1]
    square = torch.ones(size - first, size, dtype=torch.bool, device=mask.device)
    before = square.tril(first)
    # Padding looks at itself: a row of nothing would be NaN.
    return (mask.bool()[:, None, None, :] & before) | (before & square.triu(first))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def _all_plain(model: Any) -> bool:
    """True if every projection is a linear layer and nothing else (no adapters, no quantization), and the MLPs are SiLU
    without bias."""
    try:
        layers = [getattr(layer, part) for layer in model.model.layers for part in ("self_attn", "mlp")]
    except AttributeError:
        return False
    projections = [m for part in layers for name, m in part.named_children() if name.endswith("_proj")]
    mlps = [layer.mlp for layer in model.model.layers]
    unbiased = [m for mlp in mlps for m in mlp.children() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    return (
        all(type(m) is torch.nn.Linear for m in [*projections, head])
        and all(m.bias is None for m in [*unbiased, head])
        and all(isinstance(getattr(mlp, "act_fn", None), (torch.nn.SiLU, SiLUActivation)) for mlp in mlps)
    )


def is_known(model: Any) -> bool:
    """True if a model says that it is one of the plain architectures, in a precision that is known."""
    config = model.config
    return (
        config.model_type in ARCHITECTURES
        and model.dtype in TOLERANCES
        and not getattr(config, "sliding_window", None)
        and getattr(getattr(model.model, "rotary_emb", None), "rope_type", "") in ROTARY
        and _all_plain(model)
    )


def is_lean(model: Any) -> bool:
    """True if a model decodes the same without its modules: known, on a CPU, and equal on a few padded tokens.

    These are compared in the precision of its weights.
    """
    config = model.config
    if model.device.type != "cpu" or not is_known(model):
        return False
    ids = (torch.arange(12).view(2, 6) * 7 + 1) % config.vocab_size
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    found: list[Tensor] = []

    def given(_sampling: Sampling, draws: Tensor, *arguments: Any) -> ChosenTokens:
        found.append(next_logits(*arguments))
        return ids[:, min(3 + len(found), 5)], draws, draws

    try:
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
            decoder = LeanDecoder(LeanModel(model).pack(), 6, Sampling(), given)
            draws = torch.zeros(2)
            decoder.start([ids[0, 2:4].tolist(), ids[1, :4].tolist()], 2, draws)
            for _ in range(2):
                decoder.step(draws)
    except (AttributeError, RuntimeError) as error:
        logger.info("%s decodes with transformers: %s", type(model).__name__, error)
        return False
    allowed = TOLERANCES[model.dtype] * max(1.0, float(expected.abs().max()))
    same = bool((found[-1] - expected).abs().max() <= allowed)
    if not same:
        logger.info("%s decodes with transformers: the lean path differs", type(model).__name__)
    return same
