"""Protocols of scoring servers: tropd's own, or that of vLLM's OpenAI-compatible server.

Which one it is shows in its API: ours answers ``/v1/info``; a server that does not know that path but lists a
model under ``/v1/models`` is one of vLLM's.
"""

from __future__ import annotations

from typing import Protocol

import httpx
from pydantic import ValidationError

from tropd.pipeline.teacher.client.http import Exchange
from tropd.pipeline.teacher.client.vllm_dialect import VllmDialect
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import (
    CONTENT_TYPE,
    PROTOCOL_VERSION,
    ProtocolError,
    ScoreRequest,
    ScoreResponse,
    decode_response,
    encode_request,
)
from tropd.storage.errors import TropdError


class Dialect(Protocol):
    """The protocol of one server."""

    @property
    def info(self) -> ServiceInfo:
        """Its identity and the limits that it accepts."""

    def score(self, exchange: Exchange, request: ScoreRequest) -> ScoreResponse:
        """Have a request scored that is within the server's limits.

        Raises:
            TryAgainError: it may pass.
            TropdError: a refusal, or an answer that cannot be used.
        """


class TropdDialect:
    """The teacher service of this package (see ``messages``)."""

    def __init__(self, info: ServiceInfo) -> None:
        self.info = info

    def score(self, exchange: Exchange, request: ScoreRequest) -> ScoreResponse:
        """See ``Dialect.score``."""
        response = exchange.ask_in_turn("/v1/score", encode_request(request), CONTENT_TYPE)
        try:
            return decode_response(exchange.accepted(response).content, request)
        except ProtocolError as error:
            raise TropdError(f"the teacher at {exchange.url} gave an unusable answer: {error}") from error


def identify(exchange: Exchange) -> Dialect:
    """Find out the kind of server, and its teacher.

    Raises:
        TropdError: neither kind, or one that speaks another version of the protocol.
    """
    response = exchange.ask("GET", "/v1/info")
    if response.status_code == httpx.codes.NOT_FOUND:
        found = VllmDialect.find(exchange)
        if found is not None:
            return found
    try:
        info = ServiceInfo.model_validate_json(exchange.accepted(response).content)
    except ValidationError as error:
        raise TropdError(
            f"{exchange.url} is neither a tropd teacher service nor a vLLM server",
            hint="teacher.url is the address of `tropd serve-teacher` or `vllm serve`",
        ) from error
    if info.protocol != PROTOCOL_VERSION:
        raise TropdError(
            f"{exchange.url} speaks protocol {info.protocol}, this client {PROTOCOL_VERSION}",
            hint="run service and trainer with the same version of tropd",
        )
    return TropdDialect(info)
