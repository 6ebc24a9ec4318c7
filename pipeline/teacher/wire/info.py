"""The description that a scoring server gives of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tropd.pipeline.teacher.wire.messages import PROTOCOL_VERSION


class ServiceInfo(BaseModel):
    """The answer of ``/v1/info``: the teacher's identity, and the limits that it accepts."""

    model_config = ConfigDict(frozen=True)

    protocol: int = PROTOCOL_VERSION
    kind: Literal["tropd", "vllm"] = "tropd"
    """``tropd`` for our service, ``vllm`` for the known properties of a vLLM server."""
    model: str
    weights: str
    """SHA-256 of the weights (of a vLLM server, which does not report it: ``vllm:`` and the model's place)."""
    tokenizer: str
    """SHA-256 of the tokenizer's content (empty of a vLLM server)."""
    tokenizer_size: int
    tokenizer_parts: Mapping[str, str] = {}
    """SHA-256 of each part of that content, and of the chat template, by name."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the teacher's responses; none where that is not said."""
    vocab_size: int
    """Rows of the output layer."""
    max_length: int
    max_request_tokens: int
    max_request_bytes: int
    queue_tokens: int
    max_topk: int = 0
    """Most alternatives per token that it gives; 0 if it gives none."""
    max_chosen: int = 0
    """Most ids per token, chosen by the student, whose log-probs it gives; 0 if it does not (older versions, vLLM)."""
    entropy: bool = False
    """Whether it gives the full-vocabulary entropy."""
