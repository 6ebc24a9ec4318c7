"""A plain ``vllm serve`` as teacher: its ``/v1/completions``, token ids as prompts.

Such a server knows nothing of partitions, so the regions are drawn on this side, with the function that our own
service uses. The log-probs of the tokens alone are asked for first (``prompt_logprobs`` 0), then alternatives of the
outliers. Values are raw log-probs at temperature 1.

It does not give the entropy, nor a hash of its weights.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np

from tropd.pipeline.teacher.client.http import Exchange, reason
from tropd.pipeline.teacher.client.vllm_json import (
    Position,
    alternatives,
    batches,
    choices_of,
    completion_body,
    next_position,
    prompt_positions,
    token_logprobs_of,
    unusable,
)
from tropd.pipeline.teacher.service.batcher import outlier_mask
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import MAX_TOPK, ScoredItem, ScoreRequest, ScoreResponse, log_tail
from tropd.storage.errors import ConfigError, TropdError

MAX_TOKENS = 1 << 16
"""Tokens per part of a step: some 5 MB of JSON for their log-probs."""
SPARE = 8
"""Alternatives beyond k that are asked for: output layers have rows that are no tokens, which may be among them."""
MOST_NEXT = 16
"""Alternatives are asked for one by one up to this times k of a sequence: more would send more ids than they save."""
UNTOLD = 2**31 - 1
IDS_PER_TEXT = 4096
JSON = "application/json"


class VllmDialect:
    """One vLLM server.

    Args:
        info: its known properties.
        model: the name that requests must carry.
        caches: whether it keeps the keys and values of prefixes.
    """

    def __init__(self, info: ServiceInfo, model: str, *, caches: bool) -> None:
        self.info = info
        self._model = model
        self._caches = caches

    @staticmethod
    def find(exchange: Exchange) -> VllmDialect | None:
        """The server behind an exchange, with its limits; None if it is not a vLLM server."""
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
        caches = 'enable_prefix_caching="True"' in exchange.ask("GET", "/metrics").text
        most = _max_topk(exchange, name)
        return VllmDialect(info.model_copy(update={"max_topk": most}), name, caches=caches)

    def score(self, exchange: Exchange, request: ScoreRequest) -> ScoreResponse:
        """See ``Dialect.score``."""
        items = request.sequences
        sequences = [item.tokens.tolist() for item in items]
        k = min(request.k, request.vocab_limit)
        width = min(
            k + SPARE, request.vocab_limit
        )  # never above the vocabulary: the server would not survive that
        ahead = width if request.topk == "all" else 0  # everything at once where all tokens get alternatives
        found = list(self._prompts(exchange, sequences, ahead))
        teacher_logprobs = [
            token_logprobs_of(exchange.url, positions, sequence, item.start)
            for item, sequence, positions in zip(items, sequences, found, strict=True)
        ]
        masks = [
            outlier_mask(request, item, logprobs, None)
            for item, logprobs in zip(items, teacher_logprobs, strict=True)
        ]
        if request.topk == "all":
            places = [np.arange(len(mask)) for mask in masks]
            at = [positions[item.start :] for item, positions in zip(items, found, strict=True)]
        else:
            places = [np.flatnonzero(mask if request.topk == "outliers" else mask & False) for mask in masks]
            tokens = [(place + item.start).tolist() for place, item in zip(places, items, strict=True)]
            at = self._at(exchange, sequences, tokens, width)
        answers = []
        for row, place in enumerate(places):
            ids, logprobs = alternatives(exchange.url, at[row], k, width, request.vocab_limit)
            answers.append(
                ScoredItem(
                    teacher_logprobs=teacher_logprobs[row],
                    trusted=~masks[row],
                    entropy=None,
                    topk_positions=place.astype(np.int32),
                    topk_ids=ids,
                    topk_logprobs=logprobs,
                    tail=log_tail(logprobs),
                )
            )
        return ScoreResponse(answers, self.info.weights)

    def _at(
        self, exchange: Exchange, sequences: Sequence[list[int]], tokens: Sequence[list[int]], k: int
    ) -> list[list[Position]]:
        """Alternatives at some tokens of each sequence.

        Where they are few, each is asked for as the next token after its prefix, which the server has in its cache;
        else all positions up to the last of them are asked for.
        """
        few = [
            self._caches and len(t) <= min(len(s) // 4, MOST_NEXT * k)
            for s, t in zip(sequences, tokens, strict=True)
        ]
        prefixes = [
            s[:t] for s, places, one in zip(sequences, tokens, few, strict=True) if one for t in places
        ]
        cut = [s[: t[-1] + 1] for s, t, one in zip(sequences, tokens, few, strict=True) if t and not one]
        following, whole = self._next(exchange, prefixes, k), self._prompts(exchange, cut, k)
        at: list[list[Position]] = []
        for places, one in zip(tokens, few, strict=True):
            if one or not places:
                at.append(list(itertools.islice(following, len(places))))
            else:
                positions = next(whole)
                at.append([positions[t] for t in places])
        return at

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
        """The text of token ids, or None where ``/detokenize`` does not exist."""
        body = json.dumps({"model": self._model, "tokens": ids}).encode()
        response = exchange.ask("POST", "/detokenize", body, JSON)
        if response.status_code in (404, 405, 501):
            return None
        if response.status_code == httpx.codes.BAD_REQUEST:  # ids that it does not have
            return ""
        return str(exchange.accepted(response).json()["prompt"])

    def _prompts(
        self, exchange: Exchange, sequences: Sequence[list[int]], k: int
    ) -> Iterator[list[Position]]:
        """The own log-prob and ``k`` alternatives of every token of each sequence."""
        for batch in batches(sequences, per_token=k + 1, per_sequence=0):
            choices = self._complete(exchange, batch, prompt_logprobs=k)
            for sequence, choice in zip(batch, choices, strict=True):
                yield prompt_positions(exchange.url, choice, len(sequence))

    def _next(self, exchange: Exchange, prefixes: Sequence[list[int]], k: int) -> Iterator[Position]:
        """The ``k`` likeliest tokens after each prefix."""
        for batch in batches(prefixes, per_token=1, per_sequence=k):
            choices = self._complete(exchange, batch, logprobs=k, return_tokens_as_token_ids=True)
            yield from (next_position(exchange.url, choice) for choice in choices)

    def _complete(
        self, exchange: Exchange, batch: Sequence[list[int]], **options: Any
    ) -> list[dict[str, Any]]:
        body = completion_body(self._model, batch, **options)
        response = exchange.accepted(exchange.ask("POST", "/v1/completions", body, JSON))
        try:
            answer = response.json()
        except ValueError as error:
            raise unusable(exchange.url, str(error)) from error
        return choices_of(exchange.url, answer, self._model, len(batch))


def _max_topk(exchange: Exchange, model: str) -> int:
    """Most alternatives that it gives: its limit, which it states only when asked for more, less the spare ones."""
    body = completion_body(model, [[0, 0]], prompt_logprobs=10**6)
    response = exchange.ask("POST", "/v1/completions", body, JSON)
    told = re.search(r"max allowed: (\d+)", reason(response))
    if response.status_code != httpx.codes.BAD_REQUEST or told is None:
        raise TropdError(
            f"the server at {exchange.url} lists a model as vLLM does, but does not take prompt_logprobs as vLLM "
            f"does: {response.status_code}, {reason(response)}",
            hint="teacher.url is the address of `vllm serve` or `tropd serve-teacher`",
        )
    return max(0, min(int(told[1]) - SPARE, MAX_TOPK))
