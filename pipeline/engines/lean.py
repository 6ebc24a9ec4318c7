"""Decoding of well-known plain architectures on a CPU, without the overhead of modules.

A step of a tiny model costs its framework, not its arithmetic: transformers runs some 40 Python calls per layer. Llama,
Mistral, Qwen2 and Qwen3 (RMS norm, rotary positions, grouped queries, gated SiLU) are a dozen operations per layer, done
here on the model's own weights. ``is_lean`` compares with the model itself before it is trusted; whatever differs is
left to transformers.

Legend: B rows · T new tokens · S tokens so far · H hidden size · D head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary positions whose angles do not depend on how long the sequence is.
ROTARY = ("default", "linear", "llama3", "yarn")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Layer:
    """A layer's weights. The projections of queries, keys and values are one matrix, and so are gate and up; a norm's
    weights are part of the matrix that comes after it."""

    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """``[heads + kv_heads, 1, D]``: queries and keys are normalised and rotated together."""
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    down: Tensor


class LeanModel:
    """The weights of a model as they are now, ready for decoding. Made anew after each update of the weights."""

    def __init__(self, model: Any) -> None:
        config, inner = model.config, model.model
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = config.rms_norm_eps
        self.embedding = inner.embed_tokens.weight
        self.head = model.lm_head.weight * inner.norm.weight
        self.rotary = inner.rotary_emb
        self.layers = [self._layer(layer) for layer in inner.layers]

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[length, D]`` of the rotary positions; sines with the sign that ``_rotated`` wants."""
        positions = torch.arange(length, device=self.embedding.device).unsqueeze(0)
        cos, sin = self.rotary(self.embedding, positions)
        half = self.head_dim // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in projections]
        norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
        qk_norm = None
        if norms[0] is not None and norms[1] is not None:
            q_norm, k_norm = norms[0].expand(self.heads, -1), norms[1].expand(self.kv_heads, -1)
            qk_norm = torch.cat([q_norm, k_norm]).unsqueeze(1)
        return _Layer(
            qkv=torch.cat([p.weight for p in projections]) * layer.input_layernorm.weight,
            qkv_bias=None if biases[0] is None else torch.cat(biases),
            qk_norm=qk_norm,
            out=attention.o_proj.weight,
            out_bias=attention.o_proj.bias,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            * layer.post_attention_layernorm.weight,
            down=mlp.down_proj.weight,
        )


class LeanDecoder:
    """Decodes one batch: rows are left-padded, all at the same column. The cache grows by doubling."""

    def __init__(self, model: LeanModel, rows: int, capacity: int) -> None:
        self._model = model
        self._length = 0
        shape = (len(model.layers), 2, rows, model.kv_heads, capacity, model.head_dim)
        self._cache = model.embedding.new_empty(shape)
        self._cos, self._sin = model.angles(capacity)
        self._padded = True

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Float32 logits ``[B, V]`` of the last of the new tokens.

        Args:
            ids: ``[B, T]`` new tokens.
            positions: ``[B, T]`` their positions.
            mask: ``[B, S]`` 1 for tokens, 0 for padding, the new ones included.
        """
        model, (rows, new) = self._model, ids.shape
        start, end = self._length, self._length + new
        if end > self._cache.shape[4]:
            grown = self._cache.new_empty((*self._cache.shape[:4], max(end, 2 * start), model.head_dim))
            grown[..., :start, :] = self._cache[..., :start, :]
            self._cache = grown
            self._cos, self._sin = model.angles(grown.shape[4])
        if start == 0:
            self._padded = not bool(mask.all())
        self._length = end
        x = functional.embedding(ids, model.embedding)
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        allowed = _allowed(mask, new) if self._padded or new > 1 else None
        for number, layer in enumerate(model.layers):
            h = _normed(x, model.eps)
            qkv = functional.linear(h, layer.qkv, layer.qkv_bias).view(rows, new, -1, model.head_dim)
            qk, v = qkv.transpose(1, 2).split((model.heads + model.kv_heads, model.kv_heads), dim=1)
            if layer.qk_norm is not None:
                qk = _normed(qk, model.eps) * layer.qk_norm
            q, k = _rotated(qk, cos, sin).split((model.heads, model.kv_heads), dim=1)
            keys, values = self._cache[number]
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            attended = _attended(q, keys[:, :, :end], values[:, :, :end], allowed)
            x = x + functional.linear(
                attended.transpose(1, 2).reshape(rows, new, -1), layer.out, layer.out_bias
            )
            gate, up = functional.linear(_normed(x, model.eps), layer.gate_up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return functional.linear(_normed(x[:, -1], model.eps), model.head).float()

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._cache = self._cache[:, :, rows]


def _normed(x: Tensor, eps: float) -> Tensor:
    """RMS norm without its weights."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(length * length / x.shape[-1] + eps)


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


def _allowed(mask: Tensor, new: int) -> Tensor:
    """``[B, 1, T, S]`` what each new token may look at: itself, and tokens before it that are no padding."""
    seen = mask.bool()[:, None, None, :]
    if new == 1:
        return seen
    size = mask.shape[1]
    causal = torch.ones(new, size, dtype=torch.bool, device=mask.device).tril(size - new)
    # Padding looks at itself: a row of nothing would be NaN.
    return (seen & causal) | torch.eye(new, size, dtype=torch.bool, device=mask.device)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def _all_plain(model: Any) -> bool:
    """Whether every projection is a linear layer and nothing else: no adapters, no quantisation."""
    try:
        layers = [getattr(layer, part) for layer in model.model.layers for part in ("self_attn", "mlp")]
    except AttributeError:
        return False
    projections = [m for part in layers for name, m in part.named_children() if name.endswith("_proj")]
    return all(type(m) is torch.nn.Linear for m in [*projections, model.get_output_embeddings()])


def is_lean(model: Any) -> bool:
    """Whether a model decodes the same without its modules: known, on a CPU, and equal on a few padded tokens."""
    config = model.config
    if (
        config.model_type not in ARCHITECTURES
        or model.device.type != "cpu"
        or model.dtype != torch.float32
        or getattr(config, "sliding_window", None)
        or getattr(getattr(model.model, "rotary_emb", None), "rope_type", "") not in ROTARY
        or not _all_plain(model)
    ):
        return False
    ids = (torch.arange(12).view(2, 6) * 7 + 1) % config.vocab_size
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
            decoder = LeanDecoder(LeanModel(model), 2, 5)
            decoder.forward(ids[:, :4], positions[:, :4], mask[:, :4])
            decoder.forward(ids[:, 4:5], positions[:, 4:5], mask[:, :5])
            found = decoder.forward(ids[:, 5:], positions[:, 5:], mask)
    except (AttributeError, RuntimeError) as error:
        logger.info("%s decodes with transformers: %s", type(model).__name__, error)
        return False
    same = bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))
    if not same:
        logger.info("%s decodes with transformers: the lean path differs", type(model).__name__)
    return same
