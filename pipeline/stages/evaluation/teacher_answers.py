"""Scores of responses by a teacher that is not a model in this process: log-probs, and likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.stages.evaluation.distance import DenseTopk
from tropd.pipeline.stages.evaluation.held_out import sequences_of
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest, ScoreResponse
from tropd.storage.formats.trajectories import Trajectory


@dataclass(frozen=True)
class TeacherAnswer:
    """About the n tokens of a response."""

    logprobs: npt.NDArray[np.float32]
    """``[n]``."""
    alternatives: DenseTopk
    """``[n, k]``, where k may be 0."""


class Scorer(Protocol):
    """Answers scoring requests: a client of the service."""

    def score(self, request: ScoreRequest) -> ScoreResponse: ...


def ask_engine(engine: Engine, responses: Sequence[Trajectory], *, k: int) -> list[TeacherAnswer]:
    """Of an engine, which gives at most its vocabulary."""
    scores = engine.score(*sequences_of(responses), k=k)
    return [TeacherAnswer(one.token_logprobs, DenseTopk(one.topk_ids, one.topk_logprobs)) for one in scores]


def ask_service(
    client: Scorer, responses: Sequence[Trajectory], *, k: int, vocab_limit: int
) -> list[TeacherAnswer]:
    """Of a service.

    Args:
        vocab_limit: ids that the student has.

    Raises:
        TropdError: it does not answer.
    """
    if not responses:
        return []
    items = [
        ScoreItem(
            tokens=np.asarray([*response.prompt_tokens, *response.tokens], dtype=np.int32),
            start=len(response.prompt_tokens),
            student_logprobs=np.asarray(response.sampled_logprobs, dtype=np.float32),
            seed=0,
        )
        for response in responses
    ]
    request = ScoreRequest(items, AllTrusted(), "all" if k else "none", k, False, vocab_limit)
    return [
        TeacherAnswer(
            one.teacher_logprobs, _alternatives(len(one.teacher_logprobs), one.topk_ids, one.topk_logprobs)
        )
        for one in client.score(request).items
    ]


def _alternatives(tokens: int, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> DenseTopk:
    """Of a service that was asked for none, ids have a column and no rows."""
    if len(ids) == tokens:
        return DenseTopk(ids, logprobs)
    return DenseTopk(np.zeros((tokens, 0), dtype=np.int32), np.zeros((tokens, 0), dtype=np.float32))
