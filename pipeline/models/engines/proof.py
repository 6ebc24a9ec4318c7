"""The proof of an engine before it is trusted with a model: its log-probs are those of a plain forward pass.

A plain pass is the model on one row by itself: no padding, no mask, no cache. The possible differences
depend on the architecture: a cache that does not hold all of a model's state, padding that is read, positions that are
counted otherwise, attention that looks ahead, positions whose angles depend on the longest row of a batch. So every
engine tries, on a few rows of its first call, and refuses the model where they differ by more than rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tropd.pipeline.models.runtime import autocast, evaluation_mode, masked_attention
from tropd.storage.arrays import Floats32
from tropd.storage.errors import ConfigError, TropdError

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Differences in nats that rounding explains; of a log-prob below -1, the same as a share of it."""
MOST_PROMPT_TOKENS = 96
NEW_TOKENS = 8
TOKENS_OF_GRAPHS = (24, 8, 24)
"""Of three rows: one leaves the others at the first look at the tokens, see ``decoding.STEPS_ON_GPU``."""

TokenRows = Sequence[Sequence[int]]
Logprobs = Callable[[TokenRows, Sequence[int]], Sequence[Floats32]]
"""Given rows and their starts: log-probs of ``row[start:]`` of each."""


def tolerance(precision: torch.dtype) -> float:
    return TOLERANCES[torch.float32 if precision.itemsize >= 4 else torch.bfloat16]


def plain_logprobs(model: Any, precision: torch.dtype | None, limit: int | None) -> Logprobs:
    """Log-probs by the model itself, of one row after another.

    Args:
        precision: of matrix products, where it is not that of the weights.
        limit: ids from this one on are no tokens; None where all are.
    """

    def logprobs(rows: TokenRows, starts: Sequence[int]) -> list[Floats32]:
        found = []
        with (
            torch.inference_mode(),
            masked_attention(model),
            evaluation_mode(model),
            autocast(model.device, precision),
            torch.compiler.set_stance("force_eager"),
        ):
            for row, start in zip(rows, starts, strict=True):
                ids = torch.tensor([list(row)], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1, :limit].float()
                chosen = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, start:].unsqueeze(-1))
                found.append(chosen.squeeze(-1).cpu().numpy())
        return found

    return logprobs


def few(rows: TokenRows, longest: int = MOST_PROMPT_TOKENS) -> list[list[int]]:
    """The first two rows, cut to ``longest`` tokens, and half of the first: together they need padding."""
    first, *others = [list(row[: max(1, min(longest, MOST_PROMPT_TOKENS))]) for row in rows[:2]]
    return [first, first[: (len(first) + 1) // 2], *others]


def middles(rows: TokenRows) -> list[int]:
    """A start for each row, at which it has been read in part."""
    return [max(1, len(row) // 2) for row in rows]


def check_decoding(
    name: str,
    prompts: TokenRows,
    tokens: TokenRows,
    logprobs: Sequence[Sequence[float]],
    plain: Logprobs,
    tolerance: float,
) -> None:
    """Check that decoded tokens have the log-probs that a plain pass over prompt and tokens gives.

    Raises:
        ConfigError: it has not.
    """
    rows = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    expected = plain(rows, [len(prompt) for prompt in prompts])
    _compare(name, "sampled", [np.array(one, dtype=np.float32) for one in logprobs], expected, tolerance)


def require_equal_scores(
    name: str, rows: TokenRows, scores: Logprobs, plain: Logprobs, tolerance: float
) -> None:
    """Check that rows scored together have the log-probs of a plain pass over each, and so have their first halves.

    Raises:
        ConfigError: they have not.
    """
    starts = middles(rows)
    found = scores(rows, starts)
    _compare(name, "scored", found, plain(rows, starts), tolerance)
    # Later tokens must not matter: a model that looks ahead has other log-probs for the same tokens.
    cuts = [row[: start + (len(row) - start + 1) // 2] for row, start in zip(rows, starts, strict=True)]
    sooner = plain(cuts, starts)
    _compare(
        name, "scored", [one[: len(cut)] for one, cut in zip(found, sooner, strict=True)], sooner, tolerance
    )


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn a failure within the block into a refusal of this model.

    Raises:
        ConfigError: in place of any other error, except a lack of memory.
    """
    try:
        yield
    except (TropdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # architectures fail in any way
        if "memory" in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise _refusal(f"{name} cannot be run by this engine: {reason}") from error


def _compare(
    name: str, done: str, found: Sequence[Floats32], expected: Sequence[Floats32], tolerance: float
) -> None:
    one, other = np.concatenate(found), np.concatenate(expected)
    if not len(one):
        return
    # NaN in both is reported where it is used.
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    differences = np.abs(one - other)[~same]
    if not (differences <= tolerance * np.maximum(1.0, np.abs(other[~same]))).all():
        raise _refusal(
            f"{name}: log-probs of {done} tokens differ from those of a plain forward pass by up to "
            f"{float(differences.max()):.2g} nats; rounding explains {tolerance:g}"
        )


def _refusal(message: str) -> ConfigError:
    return ConfigError(
        message,
        hint="nothing was made with it. Use a model that docs/models.md lists as working, the other engine "
        '(engine = "vllm" or "transformers"), or dtype = "float32" if its weights overflow in bfloat16',
    )
