"""Rows and inputs of a training step of a tiny model, made up; the teacher is asked without a service."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import needs_reference, teacher_needs
from tropd.pipeline.objectives.objective import Objective, needs_rewards
from tropd.pipeline.teacher.service.batcher import score_requests
from tropd.pipeline.teacher.wire.messages import ScoreRequest, ScoreResponse
from tropd.pipeline.training.reward.rewards import step_rewards
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.signal.ask_teacher import ask_teacher, draw_regions
from tropd.pipeline.training.update.gradients import StepInputs
from tropd.pipeline.training.update.micro_batches import RaggedTopk

V = 24


class LocalScorer:
    """The teacher without a service around it."""

    tokens_scored = topk_tokens = bytes_sent = bytes_received = 0
    queue_seconds = 0.0

    def __init__(self, model: Any) -> None:
        self.engine = TransformersEngine(model, [1])

    def score(self, request: ScoreRequest) -> ScoreResponse:
        return score_requests(self.engine, [request])[0]


def make_rows(model: Any, count: int = 7, prefixes: bool = True) -> list[Row]:
    """Rows with prompts, prefixes and responses of different lengths; one with nothing left for the student."""
    generator = np.random.default_rng(3)
    engine = TransformersEngine(model, [1])
    rows = []
    for i in range(count):
        prompt = generator.integers(2, V, size=2 + i % 3).tolist()
        prefix = generator.integers(2, V, size=i % 4).tolist() if prefixes else []
        complete = prefixes and i == 3
        plan = RowPlan(i // 2, i, prompt, prefix, 0 if prefix else None, complete, seed=100 + i)
        tokens = [] if complete else generator.integers(2, V, size=1 + i % 5).tolist()
        logprobs: list[float] = []
        if tokens:
            (scores,) = engine.score([[*prompt, *prefix, *tokens]], [len(prompt) + len(prefix)])
            logprobs = scores.token_logprobs.tolist()
        rows.append(Row(plan, tokens, logprobs, truncated=False))
    return rows


def make_inputs(
    objective: Objective, rows: list[Row], teacher_model: Any, progress: float = 0.1
) -> StepInputs:
    scorer = LocalScorer(teacher_model)
    if teacher_needs(objective).chosen:
        rows = [
            replace(row, chosen_ids=np.array(likeliest(row, objective.k), dtype=np.int32))
            if row.tokens
            else row
            for row in rows
        ]
    teacher = ask_teacher({"": scorer}, rows, objective, teacher_needs(objective), V)
    reference = None
    written = [r for r in rows if r.tokens]
    if needs_reference(objective):
        scores = scorer.engine.score([r.sequence for r in written], [len(r.context) for r in written])
        reference = np.concatenate([s.token_logprobs for s in scores])
    guidance = None
    if teacher_needs(objective).cached_topk:
        guidance = cached_prefixes(scorer.engine, rows, objective.k)
    rewards = None
    if needs_rewards(objective):  # of a row, whatever the order
        rows = [replace(row, reward=float(row.plan.seed % 3 == 0)) for row in rows]
        rewards = step_rewards(rows, 1.0)
    regions = draw_regions(objective, rows, teacher, rewards)
    return StepInputs(rows, teacher, regions, guidance, reference, progress, rewards=rewards)


def likeliest(row: Row, k: int) -> list[list[int]]:
    """Ids that a student might have chosen: the token itself and the next ones. Which ones is for the sampler to say."""
    return [[(token + i) % V for i in range(min(k, V))] for token in row.tokens]


def cached_prefixes(engine: TransformersEngine, rows: list[Row], k: int) -> RaggedTopk:
    """What the cache would hold for the rows' prefixes: the first two to k alternatives of each token."""
    ids, logprobs, counts, tails = [], [], [], []
    for row in rows:
        if row.plan.prefix_tokens:
            (scores,) = engine.score([row.context], [len(row.plan.prompt_tokens)], k=k)
            for i in range(len(row.plan.prefix_tokens)):
                keep = 2 + i
                ids.append(scores.topk_ids[i, :keep])
                logprobs.append(scores.topk_logprobs[i, :keep])
                counts.append(len(ids[-1]))
                tails.append(math.log(max(1 - float(np.exp(logprobs[-1]).sum()), 1e-30)))
    return RaggedTopk(
        np.arange(len(counts)),
        np.array(counts, dtype=np.int64),
        np.concatenate(ids).astype(np.int64),
        np.concatenate(logprobs),
        np.array(tails, dtype=np.float32),
    )
