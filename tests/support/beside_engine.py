"""transformers in the place of vLLM in the process beside the trainer. Asleep it has no weights: they are NaN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropd.pipeline.models.engines.base import Generation, Sampling, SequenceScores
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model


class BesideEngine:
    """A ``StudentEngine``."""

    sleeps = True

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        model = load_model(folder, dtype="float32", device=torch.device("cpu"), trust_remote_code=False)
        self._engine = TransformersEngine(model, [1], batch_size=4)
        self._asleep = False

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    def rest(self) -> None:
        self._asleep = True
        for parameter in self._engine.model.parameters():
            parameter.data.fill_(torch.nan)

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._engine.model.load_state_dict(dict(weights))
        self._asleep = False

    def take_update(self, update: Mapping[str, Any]) -> None:
        raise AssertionError("there is no GPU here")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **options: Any
    ) -> list[Generation]:
        assert not self._asleep, "asleep"
        return self._engine.generate(prompts, sampling, **options)

    def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], **options: Any
    ) -> list[SequenceScores]:
        assert not self._asleep, "asleep"
        return self._engine.score(sequences, starts, **options)
