"""A teacher that follows the student: its weights become the student's, or move toward them, while that trains.

It scores in this process, since its weights change with every few steps. They are part of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from tropd.pipeline.config.sections.model_settings import FollowSettings
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.run.opening import LoadedModel, load_role
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.service.batcher import score_requests
from tropd.pipeline.teacher.wire.messages import ScoreRequest, ScoreResponse

PREFIX = "teacher."
"""Of the names of its tensors in a checkpoint."""


class FollowingTeacher:
    """Answers scoring requests as a client of the service does; nothing is sent, so no bytes are counted.

    Args:
        loaded: the student as it is before training, with weights in float32.
        settings: when and how far it follows.
        batch_tokens: tokens, padding included, per pass.
    """

    url = "this process"
    replicas: tuple[()] = ()

    def __init__(self, loaded: LoadedModel, settings: FollowSettings, batch_tokens: int) -> None:
        self._model = loaded.model
        self._engine = loaded.engine(batch_size=1, batch_tokens=batch_tokens)
        self._settings = settings
        self.tokens_scored = self.topk_tokens = self.bytes_sent = self.bytes_received = 0
        self.queue_seconds = 0.0

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score with the weights of now."""
        with within_memory("the scores of the teacher in this process", "lower service.batch_tokens"):
            (response,) = score_requests(self._engine, [request])
        self.tokens_scored += sum(len(item.teacher_logprobs) for item in response.items)
        self.topk_tokens += sum(len(item.topk_positions) for item in response.items)
        return response

    @torch.no_grad()
    def follow(self, student: Any, done: int) -> None:
        """After ``done`` steps: π_T ← decay·π_T + (1 - decay)·π_S in the weights, where these steps are due."""
        if done % self._settings.every:
            return
        own = dict(self._model.named_parameters())
        for name, parameter in student.named_parameters():
            own[name].lerp_(parameter.detach().to(own[name]), 1.0 - self._settings.decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights, by the names that they have in a checkpoint."""
        return {f"{PREFIX}{name}": parameter for name, parameter in self._model.named_parameters()}


def open_following_teacher(run: Run) -> FollowingTeacher | None:
    """The teacher of a run whose teacher follows the student; None where it is frozen."""
    settings = run.config.teacher.follow
    if settings is None:
        return None
    return FollowingTeacher(load_role(run, "teacher"), settings, run.config.service.batch_tokens)
