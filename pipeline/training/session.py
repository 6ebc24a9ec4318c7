"""Everything a training run holds in memory, assembled and checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tropd.pipeline.models.engines.base import Engine, SequenceScores
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.objectives.needs import TeacherNeeds, teacher_needs
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.run.opening import LoadedModel
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.by_domain import teacher_of, with_only
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.training.distance.held_out_set import HeldOutSet
from tropd.pipeline.training.extrapolation.base_weights import BaseWeights
from tropd.pipeline.training.inputs import Inputs
from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.mfu import TrainingPeak, training_peak
from tropd.pipeline.training.reward.judges import Judge
from tropd.pipeline.training.rollout.choosing import choosing
from tropd.pipeline.training.rollout.rows import ChooseIds, Row, RowPlan
from tropd.pipeline.training.rollout.sampler import Rolling
from tropd.pipeline.training.signal.following_teacher import FollowingTeacher
from tropd.pipeline.training.update.micro_batches import RaggedTopk
from tropd.pipeline.training.update.student import (
    StudentPass,
)
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError


@dataclass(frozen=True)
class Session:
    """Models, clients and data of the loop. Models share the process; the teacher is behind ``scorer``."""

    run: Run
    world: World
    aside: World
    """The same for the thread that prepares the next step."""
    inputs: Inputs
    """Prompts, and the outputs of earlier stages."""
    student: LoadedModel
    passes: StudentPass
    """The student in training, sharded with several processes."""
    rolling: Rolling
    """The engine that rolls out with the student's weights."""
    optimizer: torch.optim.Optimizer
    scorers: dict[str, TeacherClient | FollowingTeacher]
    """Clients of the teachers by name (see ``by_domain``); none where all scores are on disk."""
    reference: Engine | None
    problems: Encoded | None
    """Those with an answer that are evaluated along the way, spread over all."""
    held_out: HeldOutSet | None
    """Prompts and responses on which the student is compared with its teacher along the way."""
    judge: Judge | None = None
    """Source of rewards, where the objective looks at them."""
    base_weights: BaseWeights | None = None
    """The weights to extrapolate from, where the objective does."""

    @property
    def needs(self) -> TeacherNeeds:
        """The objective's demands on the teacher."""
        return teacher_needs(self.run.config.objective)

    @property
    def following(self) -> FollowingTeacher | None:
        """The teacher that follows the student, if it does."""
        found = [scorer for scorer in self.scorers.values() if isinstance(scorer, FollowingTeacher)]
        return found[0] if found else None

    @property
    def changing(self) -> dict[str, torch.Tensor]:
        """Tensors besides student and optimizer that change with the steps, by their names in a checkpoint."""
        found = {} if self.following is None else self.following.tensors()
        return found | ({} if self.base_weights is None else self.base_weights.tensors())

    @property
    def precision(self) -> torch.dtype | None:
        """Precision of the student's passes; None: that of its weights."""
        return self.passes.precision

    @property
    def ahead(self) -> bool:
        """True if the next step is prepared while one trains."""
        return self.run.config.train.max_staleness > 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.student.model.parameters() if p.requires_grad]

    @property
    def vocab_limit(self) -> int:
        """Number of ids that are tokens of the student: other rows of its output layer do not count."""
        return num_tokens(self.student.tokenizer)

    @property
    def choose_ids(self) -> ChooseIds | None:
        """Chooses the ids that the objective asks the teacher about, if it does.

        Raises:
            ConfigError: the student's engine cannot.
        """
        if not self.needs.chosen:
            return None
        if self.rolling.choose is None:
            raise ConfigError(
                "objective.alternatives = 'student' needs the student's likeliest ids, which this engine does not give",
                hint='set student.engine = "transformers", or objective.alternatives = "teacher"',
            )
        return choosing(self.rolling.choose, self.needs.chosen, self.vocab_limit)

    def training_peak(self) -> TrainingPeak | None:
        """What the GPUs that train could do at most; None where that is not known, or not which weights a token uses."""
        model = self.student.model
        if model.device.type != "cuda" or any("expert" in name for name, _ in model.named_modules()):
            return None
        return training_peak(
            torch.cuda.get_device_name(model.device),
            self.world.size,
            self.precision or model.dtype,
            ModelShape.of(model.config),
            adapters=self.run.config.student.lora is not None,
        )

    def traffic(self) -> dict[str, float]:
        """Counts of requests to the teacher so far, and their seconds in its queue, under the names of the metrics."""
        clients = self.scorers.values()
        return {
            "teacher_tokens_scored": sum(client.tokens_scored for client in clients),
            "teacher_topk_tokens": sum(client.topk_tokens for client in clients),
            "teacher_bytes_sent": sum(client.bytes_sent for client in clients),
            "teacher_bytes_received": sum(client.bytes_received for client in clients),
            "time_queue": sum(client.queue_seconds for client in clients),
        }

    @property
    def asks_as_finished(self) -> bool:
        """True if the teacher is asked about rows while others are still written: it is elsewhere, so that this takes no
        time from the student, and all that a question needs is known of a row when it is finished."""
        asked = [with_only(self.run, name).config.teacher for name in self.scorers]
        elsewhere = bool(asked) and all(teacher.urls for teacher in asked)
        return elsewhere and self.inputs.stored is None and not self.needs.chosen

    def teacher_of(self, row: Row) -> str:
        """Name of the teacher of a row."""
        return self.teacher_of_plan(row.plan)

    def teacher_of_plan(self, plan: RowPlan) -> str:
        """The same before it is written."""
        return teacher_of(self.run, self.inputs.prompts[plan.prompt_index].prompt.domain)

    def retries(self) -> list[int]:
        """Failed attempts so far per server, in the order of ``teacher.url``."""
        return [replica.retries for client in self.scorers.values() for replica in client.replicas]

    def reference_logprobs(self, rows: list[Row]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """``[T]`` log π_ref of the student's tokens, if the objective scales rewards."""
        if self.reference is None:
            return None
        written = [row for row in rows if row.tokens]
        reference = self.reference

        def score(share: list[Row]) -> list[SequenceScores]:
            return reference.score([r.sequence for r in share], [len(r.context) for r in share])

        scores = self.aside.spread(written, score)
        return np.concatenate([s.token_logprobs for s in scores]) if scores else np.zeros(0, dtype=np.float32)

    def guidance_topk(self, rows: list[Row]) -> RaggedTopk | None:
        """Cached alternatives of the step's prefix tokens, if the objective learns from them."""
        cached, prefixes = self.inputs.cached, self.inputs.store
        if cached is None or prefixes is None:
            return None
        return cached.prefixes(rows, prefixes, self.run.config.objective.k)
