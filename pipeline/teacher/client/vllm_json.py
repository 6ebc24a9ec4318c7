"""Requests to vLLM's completions and their answers, as JSON; checked as everything from outside is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tropd.storage.arrays import Floats32
from tropd.storage.bounds import are_logprobs
from tropd.storage.errors import TropdError

MAX_PROMPTS = 256
"""Sequences per request (the server takes 1,024 by default)."""
MAX_NUMBERS = 1 << 18
"""Token ids and log-probs per request: some 20 MB of JSON."""
MINUS_INFINITY = -9999.0
"""The server's value for a probability of zero, for which JSON has no number."""
# Raw log-probs whatever a server is set to report, and whatever sampling its model suggests.
_UNCHANGED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

Position = dict[str, Any]
"""Token id → ``{"logprob": …, "rank": …, "decoded_token": …}``: the actual token, and the k likeliest."""


def completion_body(model: str, sequences: Sequence[list[int]], **options: Any) -> bytes:
    """A request for one token after each sequence; ``options`` say what is wanted of it."""
    body = {"model": model, "prompt": list(sequences), "max_tokens": 1, "add_special_tokens": False}
    return json.dumps(body | _UNCHANGED | options).encode()


def batches(sequences: Sequence[list[int]], per_token: int, per_sequence: int) -> Iterator[list[list[int]]]:
    """Consecutive sequences within the limits of one request; always cut the same way.

    Args:
        per_token: numbers that a token of a sequence adds to request and answer together.
        per_sequence: numbers that a sequence adds, however long it is.
    """
    batch: list[list[int]] = []
    size = 0
    for sequence in sequences:
        cost = len(sequence) * per_token + per_sequence
        if batch and (len(batch) == MAX_PROMPTS or size + cost > MAX_NUMBERS):
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += cost
    if batch:
        yield batch


def choices_of(url: str, answer: Any, model: str, count: int) -> list[dict[str, Any]]:
    """The answers to ``count`` sequences, in their order."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if answer["model"] != model or [choice["index"] for choice in choices] != list(range(count)):
            raise ValueError("it is not about these sequences")
    except (ValueError, KeyError, TypeError) as error:
        raise unusable(url, str(error)) from error
    return choices


def prompt_positions(url: str, choice: dict[str, Any], length: int) -> list[Position]:
    """``prompt_logprobs`` of a sequence: one entry per token, the first of them empty."""
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != length:
        raise unusable(url, "it is not about these sequences")
    return positions


def next_position(url: str, choice: dict[str, Any]) -> Position:
    """``logprobs`` of the one token after a sequence, in the form of a position."""
    try:
        (top,) = choice["logprobs"]["top_logprobs"]
        ranked = sorted(top.items(), key=lambda entry: -entry[1])
        return {
            name.removeprefix("token_id:"): {"logprob": value, "rank": rank}
            for rank, (name, value) in enumerate(ranked, start=1)
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(url, f"alternatives of another form ({error})") from error


def token_logprobs_of(url: str, positions: Sequence[Position], tokens: Sequence[int], start: int) -> Floats32:
    """``[n]`` log-probs of the tokens from ``start``."""
    try:
        values = [positions[t][str(tokens[t])]["logprob"] for t in range(start, len(tokens))]
    except (KeyError, TypeError) as error:
        raise unusable(url, f"no log-prob of token {error}") from error
    return _logprobs(url, values)


def alternatives(
    url: str, positions: Sequence[Position], k: int, width: int, vocab_limit: int
) -> tuple[npt.NDArray[np.int32], Floats32]:
    """``[m, k]`` ids below ``vocab_limit`` and their log-probs, likeliest first, of the ``width`` at m positions."""
    ids = np.zeros((len(positions), k), dtype=np.int32)
    values: list[list[float]] = []
    for row, position in enumerate(positions):
        try:
            # The actual token is listed too, whether it is among the likeliest or not.
            ranked = sorted(
                (e["rank"], int(i), e["logprob"]) for i, e in position.items() if e["rank"] <= width
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unusable(url, f"alternatives of another form ({error})") from error
        known = [(i, value) for _, i, value in ranked if 0 <= i < vocab_limit][:k]
        if len(known) != k:
            raise TropdError(
                f"the teacher at {url} gave {len(known)} alternatives that the student knows, not {k}: its output "
                f"layer has rows for ids of {vocab_limit} and above",
                hint="use tropd serve-teacher, which leaves them out, or a smaller objective.k",
            )
        ids[row] = [i for i, _ in known]
        values.append([value for _, value in known])
    logprobs = _logprobs(url, [v for row in values for v in row]).reshape(len(positions), k)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def _logprobs(url: str, values: Sequence[float]) -> Floats32:
    """Checked log-probs; a little above 0 is rounding."""
    try:
        found = np.array(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise unusable(url, "a log-prob is not a number") from error
    if not are_logprobs(found):
        worst = "NaN" if np.isnan(found).any() else f"{found.max():+.3f}"
        raise TropdError(
            f"the vLLM server at {url} gave a log-prob of {worst}, which no probability has",
            hint="its prefix cache may be at fault: start it with --no-enable-prefix-caching",
        )
    found[found <= MINUS_INFINITY] = -np.inf
    return np.minimum(found, 0.0).astype(np.float32)


def unusable(url: str, why: str) -> TropdError:
    return TropdError(f"the vLLM server at {url} gave an unusable answer: {why}")
