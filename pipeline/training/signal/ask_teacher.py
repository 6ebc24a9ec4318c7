"""The teacher's scores of a step's tokens: from the service for the student's own, from the cache otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tropd.pipeline.objectives.needs import TeacherNeeds
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import Regions, partition_tokens
from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.objectives.rewards.advantages import StepRewards
from tropd.pipeline.teacher.by_domain import GENERAL
from tropd.pipeline.teacher.wire.messages import ScoredItem, ScoreItem, ScoreRequest, ScoreResponse
from tropd.pipeline.training.rollout.rows import Row, sampler_logprobs
from tropd.pipeline.training.update.micro_batches import RaggedTopk
from tropd.pipeline.training.world import ALONE, World
from tropd.storage.arrays import Floats32
from tropd.storage.seeds import derive_seed, uniforms


class TeacherScorer(Protocol):
    """Answers scoring requests: the client of the teacher service."""

    tokens_scored: int
    topk_tokens: int
    bytes_sent: int
    bytes_received: int

    def score(self, request: ScoreRequest) -> ScoreResponse: ...


@dataclass(frozen=True)
class TeacherData:
    """The teacher's view of T student tokens."""

    teacher_logprobs: Floats32
    """``[T]``; NaN where the objective asks the teacher for nothing."""
    entropy: Floats32 | None
    """``[T]`` nats, if the objective needs it."""
    topk: RaggedTopk
    """Alternatives of those tokens that need them: the teacher's, or those that the student chose."""
    overlap: Floats32 | None = None
    """``[T]`` share of the ids that the student chose that are among as many likeliest ids of the teacher, if the
    objective needs it."""

    @staticmethod
    def nothing(entropy: bool = False) -> TeacherData:
        """Of a step without student tokens."""
        none = np.zeros(0, dtype=np.float32)
        return TeacherData(none, none if entropy else None, RaggedTopk.empty())

    @staticmethod
    def unasked(count: int) -> TeacherData:
        """Of a step whose ``count`` student tokens the teacher does not see: NaN, which no loss may use."""
        return TeacherData(np.full(count, np.nan, dtype=np.float32), None, RaggedTopk.empty())


def ask_teacher(
    scorers: Mapping[str, TeacherScorer],
    rows: Sequence[Row],
    objective: Objective,
    needs: TeacherNeeds,
    vocab_limit: int,
    world: World = ALONE,
    *,
    teacher_of: Callable[[Row], str] = lambda row: GENERAL,
) -> TeacherData:
    """Have the student's tokens scored: no prompt, no prefix and no padding is asked for.

    Args:
        scorers: the teachers by name; they are asked at the same time.
        teacher_of: name of a row's teacher.
    """
    items = [(teacher_of(row), item_of(row)) for row in rows if row.tokens]

    def ask_one(name: str, sequences: list[ScoreItem]) -> list[ScoredItem]:
        return list(scorers[name].score(request_of(sequences, objective, needs, vocab_limit)).items)

    def ask(share: list[tuple[str, ScoreItem]]) -> list[ScoredItem]:
        parts: dict[str, list[ScoreItem]] = defaultdict(list)
        for name, item in share:
            parts[name].append(item)
        if len(parts) <= 1:
            return [answer for name, part in parts.items() for answer in ask_one(name, part)]
        with ThreadPoolExecutor(len(parts)) as pool:
            asked = {name: pool.submit(ask_one, name, part) for name, part in parts.items()}
            answers = {name: iter(future.result()) for name, future in asked.items()}
        return [next(answers[name]) for name, _ in share]

    return teacher_data([item for _, item in items], world.spread(items, ask), needs)


def item_of(row: Row) -> ScoreItem:
    """The question about a row that has tokens."""
    return ScoreItem(
        tokens=np.asarray([*row.scored_after, *row.tokens], dtype=np.int32),
        start=len(row.scored_after),
        student_logprobs=row.sampler_array.astype(np.float32),
        seed=partition_seed(row),
        chosen=row.chosen_ids,
    )


def request_of(
    sequences: Sequence[ScoreItem], objective: Objective, needs: TeacherNeeds, vocab_limit: int
) -> ScoreRequest:
    """The question about some rows, at least one."""
    return ScoreRequest(
        sequences=sequences,
        # Which rows are right is known here alone; what the service needs for it, it gives everywhere (see needs).
        partition=AllTrusted() if objective.partition.rule == "reward" else objective.partition,
        topk=needs.topk,
        k=needs.k,
        entropy=needs.entropy,
        vocab_limit=vocab_limit,
        # Of a small vocabulary, all of it is chosen.
        chosen=0 if sequences[0].chosen is None else sequences[0].chosen.shape[1],
        overlap=needs.overlap,
    )


def teacher_data(
    items: Sequence[ScoreItem], answers: Sequence[ScoredItem], needs: TeacherNeeds
) -> TeacherData:
    """The answers about a step's rows that have tokens, in the order of the rows."""
    if not answers:
        return TeacherData.nothing(needs.entropy)
    first = np.cumsum([0, *(len(a.teacher_logprobs) for a in answers)])
    topk, overlap = RaggedTopk.empty(), None
    if needs.chosen:
        topk = _chosen_topk(items, answers)
        shares = [a.chosen_overlap for a in answers if a.chosen_overlap is not None]
        overlap = np.concatenate(shares) if needs.overlap else None
    if needs.topk != "none":
        index = np.concatenate([a.topk_positions + f for a, f in zip(answers, first[:-1], strict=True)])
        ids = np.concatenate([a.topk_ids for a in answers]).astype(np.int64)
        topk = RaggedTopk(
            index=index.astype(np.int64),
            counts=np.full(len(index), ids.shape[1], dtype=np.int64),
            ids=ids.reshape(-1),
            logprobs=np.concatenate([a.topk_logprobs for a in answers]).reshape(-1),
            tail=np.concatenate([a.tail for a in answers]),
        )
    entropy = np.concatenate([a.entropy for a in answers if a.entropy is not None]) if needs.entropy else None
    return TeacherData(np.concatenate([a.teacher_logprobs for a in answers]), entropy, topk, overlap)


def _chosen_topk(items: Sequence[ScoreItem], answers: Sequence[ScoredItem]) -> RaggedTopk:
    """The ids that the student chose at every token, with the teacher's log-probs."""
    ids = np.concatenate([item.chosen for item in items if item.chosen is not None])
    logprobs = [a.chosen_logprobs for a in answers if a.chosen_logprobs is not None]
    return RaggedTopk(
        index=np.arange(len(ids)),
        counts=np.full(len(ids), ids.shape[1], dtype=np.int64),
        ids=ids.reshape(-1).astype(np.int64),
        logprobs=np.concatenate(logprobs).reshape(-1),
        tail=np.concatenate([a.chosen_tail for a in answers if a.chosen_tail is not None]),
    )


def partition_seed(row: Row) -> int:
    """Seed of the numbers that the sampled partition draws for a row."""
    return derive_seed(row.plan.seed, "partition")


def draw_regions(
    objective: Objective, rows: Sequence[Row], teacher: TeacherData, rewards: StepRewards | None = None
) -> Regions:
    """Partition the step's student tokens, with the same draws as the service."""
    lengths = [len(row.tokens) for row in rows]
    return partition_tokens(
        objective.partition,
        student_logprobs=sampler_logprobs(rows).astype(np.float32),
        teacher_logprobs=teacher.teacher_logprobs,
        uniforms=partition_draws(rows),
        teacher_entropy=teacher.entropy,
        correct=None if rewards is None else np.repeat(rewards.correct, lengths),
    )


def partition_draws(rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """One uniform number per student token, from the row's seed and the token's place in what the teacher reads."""
    parts = [
        uniforms(partition_seed(row), len(row.scored_after) + np.arange(len(row.tokens)))
        for row in rows
        if row.tokens
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
