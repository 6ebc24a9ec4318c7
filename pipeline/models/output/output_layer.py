"""The output layer: logits in float32, whatever the precision of weights and hidden states.

A product in bfloat16 is added up in float32, but the result is rounded to 8 bits: logits of 20 to 30 are then off
by up to 0.06, and so is each log-prob. Here the sums come out as they are. A CPU cannot do that: there this product is in
float32, and up to three times as slow as it would be. The gradient's products are in the lower precision.

Rows of the output layer beyond the tokenizer's ids are no tokens (layers are padded to sizes that hardware likes). They
get no probability: the softmax is over tokens, in sampling, scoring and training alike.

Legend: n positions · H hidden size · V rows of the output layer.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tropd.pipeline.models.engines.proof import refusing
from tropd.pipeline.models.runtime import evaluation_mode, masked_attention

logger = logging.getLogger(__name__)
# Rows of a weight in lower precision that are float32 at once, on a CPU.
BLOCK = 8192


def is_plain(head: Any) -> bool:
    """True if a head is a linear layer and nothing else, so that its gradient can be written down."""
    return type(head) is torch.nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def product_dtype(states: Tensor) -> torch.dtype:
    """The precision that a linear layer would have here: that of autocast where it is on, or of the states."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as ``plain_logits`` wants it, where it is used more than once."""
    return weight if weight.device.type == "cpu" else weight.to(dtype)


def workspace(rows: int, weight: Tensor) -> Tensor | None:
    """Memory ``[rows, V]`` for logits that are made again and again. On a CPU, fresh memory costs a fifth of the product
    that fills it; on a GPU, PyTorch keeps it."""
    return torch.empty(rows, len(weight)) if weight.device.type == "cpu" else None


def plain_logits(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    softcap: float | None = None,
    space: Tensor | None = None,
) -> Tensor:
    """Float32 logits ``[n, V]`` of states ``[n, H]``, from a product whose precision would be ``dtype``.

    They lie in the first n rows of ``space``, a ``workspace``, if given.
    """
    with torch.autocast(states.device.type, enabled=False):
        if states.device.type == "cpu" and dtype.itemsize <= 4:
            logits = _on_cpu(states.float(), weight, None if space is None else space[: len(states)])
        elif dtype.itemsize < 4 and keeps_sums(states.device, dtype):
            logits = torch.mm(states.to(dtype), weight.to(dtype).T, out_dtype=torch.float32)
        else:
            logits = functional.linear(states.to(dtype), weight.to(dtype)).float()
        if bias is not None:
            logits.add_(bias)
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _on_cpu(states: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    if weight.dtype == torch.float32:
        return torch.mm(states, weight.T, out=out)
    out = states.new_empty(len(states), len(weight)) if out is None else out
    for low in range(0, len(weight), BLOCK):
        block = slice(low, low + BLOCK)
        out[:, block] = functional.linear(states, weight[block].float())
    return out


@functools.cache
def keeps_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """True if a product can come out in float32 (CUDA, since PyTorch 2.8). 267 would be rounded."""
    operand = torch.ones(16, 264, device=device, dtype=dtype)
    operand[:, 0] = 2
    try:
        sums = torch.mm(operand, operand.T, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((sums == 267).all())


def mask_rows_(logits: Tensor, limit: int | None) -> Tensor:
    """Logits ``[n, V]`` with -inf, where they lie, from the column ``limit`` on; the columns stay, since products of odd
    sizes are slow on a GPU."""
    if limit is not None:
        logits[:, limit:] = -torch.inf
    return logits


class PlainHead(torch.autograd.Function):
    """``plain_logits`` with its gradient. Inputs: states ``[n, H]``, weight ``[V, H]``, bias ``[V]`` or None, and the
    precision of products."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, weight, bias)
        ctx.dtype = dtype
        return plain_logits(states, weight, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        low = grad.to(ctx.dtype)
        return (
            (low @ weight.to(ctx.dtype)).to(states.dtype) if wants_states else None,
            (low.T @ states.to(ctx.dtype)).to(weight.dtype) if wants_weight else None,
            grad.sum(dim=0).to(bias.dtype) if wants_bias else None,
            None,
        )


@dataclass(frozen=True)
class SplitModel:
    """A causal LM as backbone (token ids to hidden states) and head (hidden states to logits).

    Lets logits be computed for chosen positions only. ``softcap`` bounds logits as c·tanh(logit/c). Rows of the head from
    ``limit`` on are no tokens; None where all are.
    """

    backbone: Any
    head: Any
    softcap: float | None
    limit: int | None = None

    def hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states ``[B, T, H]``."""
        hidden: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return hidden

    def vocabulary(self, states: Tensor) -> int:
        """Size of the output layer (of the states themselves where the head is not separable)."""
        weight = getattr(self.head, "weight", None)
        return int(states.shape[-1] if weight is None else weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., tokens]`` of hidden states ``[..., H]``."""
        dtype = product_dtype(hidden)
        if dtype.itemsize < 4 and is_plain(self.head):
            states = hidden.reshape(-1, hidden.shape[-1])
            logits = PlainHead.apply(states, self.head.weight, self.head.bias, dtype)
            logits = logits.view(*hidden.shape[:-1], logits.shape[-1])
        else:
            logits = self.head(hidden).float()
        logits = self.capped(logits)
        return logits if self.limit is None else logits[..., : self.limit]

    def own_logits(self, states: Tensor, space: Tensor | None) -> Tensor:
        """Float32 logits ``[n, V]`` of states ``[n, H]``, without gradient, that the caller may write over; -inf for what
        is not a token.

        They lie in ``space`` if given; see ``workspace``.
        """
        head, dtype = self.head, product_dtype(states)
        if is_plain(head):
            logits = plain_logits(states, head.weight, head.bias, dtype, softcap=self.softcap, space=space)
        else:
            logits = self.capped(head(states).float().clone())
        return mask_rows_(logits, self.limit)

    def next_logits(self, **inputs: Any) -> Tensor:
        """Float32 logits ``[B, tokens]`` after the last token; the cache among the inputs is written to."""
        if isinstance(self.backbone, _WholeModel):
            inputs["logits_to_keep"] = 1
        return self.logits(self.backbone(**inputs, use_cache=True).last_hidden_state[:, -1])

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _WholeModel:
    """Stands in for a backbone where the head cannot be taken apart: its 'hidden states' are the logits."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        output.last_hidden_state = output.logits
        return output


def split_model(model: Any, num_tokens: int | None = None) -> SplitModel:
    """Take a causal LM apart, and check on a few tokens that the parts give the model's own logits.

    Where they do not (unusual heads, scaled logits), the whole model is used, with more memory.

    Args:
        num_tokens: ids that the tokenizer has; all rows of the output layer if None.

    Raises:
        ConfigError: the model does not run.
    """
    split = _split(model)
    if num_tokens is None or num_tokens >= model.get_output_embeddings().weight.shape[0]:
        return split
    return replace(split, limit=num_tokens)


def _split(model: Any) -> SplitModel:
    backbone, head = model.base_model, model.get_output_embeddings()
    whole = SplitModel(_WholeModel(model), torch.nn.Identity(), None)
    if backbone is model or head is None:
        logger.info("%s has no separable head: logits of all positions are computed", type(model).__name__)
        return whole
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    split = SplitModel(backbone, head, softcap)
    vocab = head.weight.shape[0]
    ids = (torch.arange(8, device=model.device) * 7 % vocab).unsqueeze(0)
    with torch.no_grad(), masked_attention(model), evaluation_mode(model):
        with refusing(type(model).__name__):
            expected = model(input_ids=ids, use_cache=False).logits.float()
        try:  # through the head itself, which rounds as the model does
            actual = split.capped(head(split.hidden(input_ids=ids))).float()
        except (AttributeError, RuntimeError, TypeError):  # something lies between the two
            actual = expected[:0]
    if expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-3, atol=1e-3):
        return split
    logger.info("%s has an unusual head: logits of all positions are computed", type(model).__name__)
    return whole
