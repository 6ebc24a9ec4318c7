"""Drawing tokens from logits with one uniform number per token, so that a row depends on its own seed only."""

from __future__ import annotations

import torch

from tropd.pipeline.models.engines.base import Sampling


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: ``[B, V]`` float32.
        uniforms: ``[B]`` float64 in [0, 1); unused when the temperature is 0 (greedy).
        sampling: ``temperature`` divides the logits for sampling only; ``top_p`` keeps the smallest set of likeliest
            tokens whose mass reaches this.

    Returns:
        Token ids ``[B]``; their log-probs ``[B]`` (float32, full softmax at temperature 1); and their log-probs ``[B]``
        (float32) under the distribution drawn from: at the sampling temperature, renormalized over the nucleus.
    """
    temperature, top_p = sampling.temperature, sampling.top_p
    logprobs = torch.log_softmax(logits, dim=-1)
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1)
        chosen = _gather(logprobs, tokens)
        return tokens, chosen, torch.zeros_like(chosen)
    probabilities = logprobs.exp() if temperature == 1.0 else torch.softmax(logits / temperature, dim=-1)
    if top_p < 1.0:
        probabilities = _nucleus(probabilities, top_p)
    # Float64: in float32 the rounding of a sum over a large vocabulary would bias the last tokens.
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    chosen = _gather(logprobs, tokens)
    if sampling.plain:
        return tokens, chosen, chosen
    drawn = (_gather(probabilities, tokens).double() / cumulative[:, -1]).log().float()
    return tokens, chosen, drawn


def _gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
