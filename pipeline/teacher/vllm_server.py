"""A plain ``vllm serve`` as teacher: its ``/v1/completions`` with ``prompt_logprobs``, token ids as prompts.

Such a server knows nothing of partitions, so the regions are drawn on this side, with the function that our own
service uses. The log-probs of the tokens alone are asked for first; alternatives in a second request, for the
sequences that have outliers, each cut behind its last one. Values are raw log-probs at temperature 1.

What it does not give: the entropy, and a hash of its weights. What it costs: JSON of some 60 bytes per number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from tropd.pipeline.teacher.batcher import outlier_mask
from tropd.pipeline.teacher.exchange import Exchange, reason
from tropd.pipeline.teacher.info import ServiceInfo
from tropd.pipeline.teacher.protocol import (
    MAX_TOPK,
    POSITIVE_SLACK,
    ScoredItem,
    ScoreRequest,
    ScoreResponse,
    log_tail,
)
from tropd.storage.errors import ConfigError, TropdError

MAX_PROMPTS = 256
"""Sequences per request (the server takes 1,024 unless told otherwise)."""
MAX_TOKENS = 1 << 16
"""Tokens per part of a step: some 5 MB of JSON for their log-probs."""
MAX_ALTERNATIVES = 1 << 18
"""Alternatives per request: some 20 MB of JSON."""
MINUS_INFINITY = -9999.0
"""What the server writes for a probability of zero, which JSON has no number for."""
UNTOLD = 2**31 - 1
IDS_PER_TEXT = 4096
_JSON = "application/json"

Floats = npt.NDArray[np.float32]
Position = dict[str, Any]
"""Token id → ``{"logprob": …, "rank": …, "decoded_token": …}``: the token that is there, and the k likeliest."""


class VllmDialect:
    """One vLLM server.

    Args:
        info: what is known of it.
        model: the name that requests must carry.
    """

    def __init__(self, info: ServiceInfo, model: str) -> None:
        self.info = info
        self._model = model

    @staticmethod
    def find(exchange: Exchange) -> VllmDialect | None:
        """The server behind an exchange, with its limits; None if it is no vLLM server."""
        response = exchange.ask("GET", "/v1/models")
        try:
            card = response.json()["data"][0]
            name, length = str(card["id"]), int(card["max_model_len"])
            root = str(card.get("root") or name)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
        info = ServiceInfo(
            kind="vllm",
            model=name,
            weights=f"vllm:{root}",
            tokenizer="",
            tokenizer_size=0,
            vocab_size=UNTOLD,
            max_length=length - 1,  # it always generates a token
            max_request_tokens=max(MAX_TOKENS, length),
            max_request_bytes=1 << 30,
            queue_tokens=MAX_TOKENS,
        )
        return VllmDialect(info.model_copy(update={"max_topk": _max_topk(exchange, name)}), name)

    def score(self, exchange: Exchange, request: ScoreRequest) -> ScoreResponse:
        """See ``Dialect.score``."""
        items = request.sequences
        k = min(request.k, request.vocab_limit)
        ahead = k if request.topk == "all" else 0  # everything at once where all tokens get alternatives
        found = list(self._ask(exchange, [item.tokens.tolist() for item in items], ahead))
        sampled = [
            _sampled(exchange.url, positions, item.tokens.tolist(), item.start)
            for item, positions in zip(items, found, strict=True)
        ]
        masks = [
            outlier_mask(request, item, logprobs, None) for item, logprobs in zip(items, sampled, strict=True)
        ]
        everything = [np.ones_like(mask) for mask in masks]
        nothing = [np.zeros_like(mask) for mask in masks]
        wanted = {"none": nothing, "outliers": masks, "all": everything}[request.topk]
        places = [np.flatnonzero(where) for where in wanted]
        if request.topk == "outliers":
            rows = [row for row, place in enumerate(places) if len(place)]
            cut = [items[row].tokens[: items[row].start + int(places[row][-1]) + 1].tolist() for row in rows]
            found = [[] for _ in items]
            for row, positions in zip(rows, self._ask(exchange, cut, k), strict=True):
                found[row] = positions
        answers = []
        for row, item in enumerate(items):
            at = [found[row][item.start + int(place)] for place in places[row]]
            ids, logprobs = _alternatives(exchange.url, at, k, request.vocab_limit)
            answers.append(
                ScoredItem(
                    teacher_logprobs=sampled[row],
                    trusted=~masks[row],
                    entropy=None,
                    topk_positions=places[row].astype(np.int32),
                    topk_ids=ids,
                    topk_logprobs=logprobs,
                    tail=log_tail(logprobs),
                )
            )
        return ScoreResponse(answers, self.info.weights)

    def check_tokenizer(self, exchange: Exchange, decode: Callable[[list[int]], str], size: int) -> bool:
        """Compare what every token id means to the server and to the student. False: the server does not say.

        Raises:
            ConfigError: with the first ids whose text differs.
        """
        for low in range(0, size, IDS_PER_TEXT):
            ids = list(range(low, min(low + IDS_PER_TEXT, size)))
            theirs = self._text(exchange, ids)
            if theirs is None:
                return False
            if theirs == decode(ids):
                continue
            while len(ids) > 1:  # halve: each step asks for one text
                half = ids[: len(ids) // 2]
                ids = half if self._text(exchange, half) != decode(half) else ids[len(ids) // 2 :]
            raise ConfigError(
                f"the vLLM server at {exchange.url} has another tokenizer than the student: token {ids[0]} is "
                f"{self._text(exchange, ids)!r} there and {decode(ids)!r} here",
                hint="distillation by log-probs needs models that share a tokenizer",
            )
        return True

    def _text(self, exchange: Exchange, ids: list[int]) -> str | None:
        """The text of token ids, or None where there is no ``/detokenize``."""
        body = json.dumps({"model": self._model, "tokens": ids}).encode()
        response = exchange.ask("POST", "/detokenize", body, _JSON)
        if response.status_code in (404, 405, 501):
            return None
        if response.status_code == httpx.codes.BAD_REQUEST:  # ids that it does not have
            return ""
        return str(exchange.accepted(response).json()["prompt"])

    def _ask(self, exchange: Exchange, sequences: Sequence[list[int]], k: int) -> Iterator[list[Position]]:
        """``prompt_logprobs`` of each sequence: one entry per token, the first of them empty."""
        for batch in _batches(sequences, k):
            response = exchange.accepted(
                exchange.ask("POST", "/v1/completions", _body(self._model, batch, k), _JSON)
            )
            try:
                answer = response.json()
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                found = [choice["prompt_logprobs"] for choice in choices]
                if answer["model"] != self._model or [len(f) for f in found] != [len(b) for b in batch]:
                    raise ValueError("it is not about these sequences")
            except (ValueError, KeyError, TypeError) as error:
                raise _unusable(exchange.url, str(error)) from error
            yield from found


def _max_topk(exchange: Exchange, model: str) -> int:
    """The server's limit of alternatives, which it tells only who asks for more."""
    response = exchange.ask("POST", "/v1/completions", _body(model, [[0, 0]], 10**6), _JSON)
    told = re.search(r"max allowed: (\d+)", reason(response))
    if response.status_code != httpx.codes.BAD_REQUEST or told is None:
        raise TropdError(
            f"the server at {exchange.url} lists a model as vLLM does, but does not take prompt_logprobs as vLLM "
            f"does: {response.status_code}, {reason(response)}",
            hint="use vllm serve, or tropd serve-teacher -w WORKSPACE",
        )
    return min(int(told[1]), MAX_TOPK)


def _body(model: str, sequences: Sequence[list[int]], k: int) -> bytes:
    body = {
        "model": model,
        "prompt": list(sequences),
        "prompt_logprobs": k,
        "max_tokens": 1,
        "temperature": 0.0,
        "add_special_tokens": False,
    }
    return json.dumps(body).encode()


def _batches(sequences: Sequence[list[int]], k: int) -> Iterator[list[list[int]]]:
    """Consecutive sequences within the limits of one request; always cut the same way."""
    batch: list[list[int]] = []
    size = 0
    for sequence in sequences:
        cost = len(sequence) * (k + 1)
        if batch and (len(batch) == MAX_PROMPTS or size + cost > MAX_ALTERNATIVES):
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += cost
    if batch:
        yield batch


def _sampled(url: str, positions: Sequence[Position], tokens: Sequence[int], start: int) -> Floats:
    """``[n]`` log-probs of the tokens from ``start``."""
    try:
        values = [positions[t][str(tokens[t])]["logprob"] for t in range(start, len(tokens))]
    except (KeyError, TypeError) as error:
        raise _unusable(url, f"no log-prob of token {error}") from error
    return _logprobs(url, values)


def _alternatives(
    url: str, positions: Sequence[Position], k: int, vocab_limit: int
) -> tuple[npt.NDArray[np.int32], Floats]:
    """``[m, k]`` ids below ``vocab_limit`` and their log-probs at m positions, likeliest first."""
    ids = np.zeros((len(positions), k), dtype=np.int32)
    values: list[list[float]] = []
    for row, position in enumerate(positions):
        try:
            # The token that is there comes first, whether it is among the k likeliest or not.
            ranked = sorted((e["rank"], int(i), e["logprob"]) for i, e in position.items() if e["rank"] <= k)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unusable(url, f"alternatives of another form ({error})") from error
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


def _logprobs(url: str, values: Sequence[float]) -> Floats:
    """Checked log-probs; up to ``POSITIVE_SLACK`` above 0 is rounding."""
    try:
        found = np.array(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise _unusable(url, "a log-prob is no number") from error
    if np.isnan(found).any() or (found > POSITIVE_SLACK).any():
        worst = "NaN" if np.isnan(found).any() else f"{found.max():+.3f}"
        raise TropdError(
            f"the vLLM server at {url} gave a log-prob of {worst}, which no probability has",
            hint="its prefix cache may be at fault: start it with --no-enable-prefix-caching",
        )
    found[found <= MINUS_INFINITY] = -np.inf
    return np.minimum(found, 0.0).astype(np.float32)


def _unusable(url: str, why: str) -> TropdError:
    return TropdError(f"the vLLM server at {url} gave an unusable answer: {why}")
