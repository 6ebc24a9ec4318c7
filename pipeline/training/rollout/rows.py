"""The rows of a training step: prompts, teacher prefixes, and the student's tokens after them.

Everything is a function of (seed, step), so that a resumed run makes the same rows as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tropd.pipeline.config.sections.training_settings import RolloutConfig
from tropd.pipeline.models.engines.base import Generation, IdTable, Sampler, Sampling
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.objectives.objective import Schedule
from tropd.pipeline.objectives.prefix_schedule import prefix_length, row_limit
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.training.world import ALONE, World
from tropd.storage.arrays import Floats64
from tropd.storage.formats.trajectory_store import TrajectoryStore
from tropd.storage.seeds import derive_seed, uniforms

ChooseIds = Callable[[Sequence[Sequence[int]], Sequence[int]], list[IdTable]]
"""Given sequences and starts: the ids ``[n, c]`` that the student chooses at the tokens from each start."""


@dataclass(frozen=True)
class RowPlan:
    """One row before the student has written: a prompt, a seed, and the teacher tokens to start from."""

    slot: int
    """Number of the prompt within the step."""
    prompt_index: int
    prompt_tokens: Sequence[int]
    prefix_tokens: Sequence[int]
    trajectory: int | None
    """Row of the trajectory store that the prefix comes from."""
    prefix_complete: bool
    """Nothing is left for the student: the prefix is a whole response, or has no room after it."""
    seed: int
    prefix_truncated: bool = False
    """The prefix is complete, but ended by its length."""
    teacher_tokens: Sequence[int] | None = None
    """The prompt as the teacher reads it, where that has a context of its own."""


@dataclass(frozen=True)
class Row:
    """One row with the student's tokens (none if the prefix is complete)."""

    plan: RowPlan
    tokens: Sequence[int]
    sampler_logprobs: Sequence[float]
    """log π_S of ``tokens`` as the sampling engine has it: full softmax, temperature 1."""
    truncated: bool
    """The response ended by its length, in the student's tokens or in the prefix."""
    drawn_logprobs: Sequence[float] | None = None
    """log μ of ``tokens``, of the distribution they were drawn from: at the sampling temperature, renormalized over
    the nucleus. None where the sampling was plain, and ``sampler_logprobs`` are these."""
    chosen_ids: IdTable | None = None
    """``[n, c]`` the sampler's likeliest ids at each of ``tokens``, where the objective asks the teacher about them."""
    reward: float | None = None
    """Reward of the response; None: it has none, or none was asked for."""
    token_rewards: Sequence[float] | None = None
    """Rewards of single ``tokens``, NaN where one has none; None: rewards are for whole rows."""

    @cached_property
    def sampler_array(self) -> Floats64:
        """``sampler_logprobs`` as an array, made once: a step looks at millions of them, again and again."""
        return np.asarray(self.sampler_logprobs, dtype=np.float64)

    @cached_property
    def mu_array(self) -> Floats64:
        """log μ of ``tokens``, for importance weights."""
        return (
            self.sampler_array
            if self.drawn_logprobs is None
            else np.asarray(self.drawn_logprobs, dtype=np.float64)
        )

    @property
    def context(self) -> list[int]:
        """Prompt and prefix."""
        return [*self.plan.prompt_tokens, *self.plan.prefix_tokens]

    @property
    def sequence(self) -> list[int]:
        return [*self.context, *self.tokens]

    @property
    def scored_after(self) -> list[int]:
        """Prompt and prefix as the teacher reads them."""
        if self.plan.teacher_tokens is None:
            return self.context
        return [*self.plan.teacher_tokens, *self.plan.prefix_tokens]


def sampler_logprobs(rows: Sequence[Row]) -> Floats64:
    """``[T]`` log π_S of the tokens of all rows, in their order, as the sampling engine has it."""
    return np.concatenate([np.zeros(0), *(row.sampler_array for row in rows)])


RowFinished = Callable[[Row], None]
"""Told of a row of a step. It returns at once and raises nothing."""


def mu_logprobs(rows: Sequence[Row]) -> Floats64:
    """``[T]`` log μ likewise: of the distribution that the tokens were drawn from."""
    return np.concatenate([np.zeros(0), *(row.mu_array for row in rows)])


def prompts_of_step(step: int, num_prompts: int, per_step: int, seed: int) -> list[int]:
    """Prompt indices of a step: consecutive pieces of one seeded permutation per pass over the data."""
    positions = np.arange(step * per_step, (step + 1) * per_step)
    chosen = np.empty(per_step, dtype=np.int64)
    for epoch in np.unique(positions // num_prompts):
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", int(epoch))))
        here = positions // num_prompts == epoch
        chosen[here] = generator.permutation(num_prompts)[positions[here] % num_prompts]
    return [int(i) for i in chosen]


def plan_rows(
    step: int,
    *,
    prompts: Sequence[EncodedPrompt],
    store: TrajectoryStore | None,
    schedule: Schedule,
    limit: int,
    rollout: RolloutConfig,
    seed: int,
    continued: bool = True,
) -> list[RowPlan]:
    """Rows of a step with their teacher prefixes.

    A trajectory that ended by its length is not a whole response: the student continues from its end, where
    ``rollout.max_tokens`` leaves room.

    Args:
        limit: scheduled prefix length of this step, in tokens of ``rollout.max_tokens`` (see ``row_limit``).
        store: teacher trajectories; None where the objective uses none.
        continued: the student completes the prefixes; otherwise it writes nothing, wherever they end.
    """
    rows = []
    for slot, index in enumerate(prompts_of_step(step, len(prompts), rollout.prompts_per_step, seed)):
        available = store.rows_of(prompts[index].id) if store is not None and limit > 0 else []
        for sample in range(rollout.samples_per_prompt):
            row_seed = derive_seed(seed, "rollout", step, slot, prompts[index].id, sample)
            prefix: list[int] = []
            trajectory, complete, ended = None, False, True
            if available and store is not None:
                pick = int(uniforms(derive_seed(row_seed, "trajectory"), 0) * len(available))
                trajectory = available[pick]
                written = store.tokens(trajectory)
                whole = written[: rollout.max_tokens]
                longest = row_limit(schedule, limit=limit, max_tokens=rollout.max_tokens, written=len(whole))
                prefix = whole[: prefix_length(schedule, limit=longest, seed=row_seed)]
                ended = len(whole) == len(written) and not store.truncated(trajectory)
                more = continued and not ended and len(whole) < rollout.max_tokens
                complete = len(prefix) == len(whole) > 0 and not more
            rows.append(
                RowPlan(
                    slot,
                    index,
                    prompts[index].tokens,
                    prefix,
                    trajectory if prefix else None,
                    complete,
                    row_seed,
                    prefix_truncated=complete and not ended,
                    teacher_tokens=prompts[index].teacher_tokens,
                )
            )
    return rows


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """How the student samples in training."""
    return Sampling(rollout.temperature, rollout.top_p)


def roll_out(
    plans: Sequence[RowPlan],
    engine: Sampler,
    rollout: RolloutConfig,
    world: World = ALONE,
    *,
    choose: ChooseIds | None = None,
    finished: RowFinished | None = None,
) -> list[Row]:
    """Let the student continue every row that its prefix leaves unfinished.

    Args:
        choose: also choose ids at the new tokens, with the weights that they were sampled with.
        finished: told of every row that this process continues, once: of a row that the engine tells of while others are
            still written, and of the rest at the end. Not with ``choose``: its ids come when all is written.
    """
    sampling = sampling_of(rollout)
    continued = to_continue(plans)
    own = world.share(continued)
    told: set[int] = set()

    def row_of(plan: RowPlan, one: Generation, ids: IdTable | None = None) -> Row:
        drawn = None if sampling.plain else one.drawn_logprobs
        return Row(plan, one.tokens, one.logprobs, one.finish_reason == "length", drawn, chosen_ids=ids)

    def tell(place: int, one: Generation) -> None:
        if finished is not None and place not in told:
            told.add(place)
            finished(row_of(own[place], one))

    def generate(share: list[RowPlan]) -> list[Generation]:
        with within_memory(
            "the student's responses of a step", "lower rollout.batch_size or rollout.max_tokens"
        ):
            return engine.generate(
                [[*p.prompt_tokens, *p.prefix_tokens] for p in share],
                sampling,
                seeds=[p.seed for p in share],
                max_tokens=[rollout.max_tokens - len(p.prefix_tokens) for p in share],
                finished=None if finished is None else tell,
            )

    def write(share: list[RowPlan]) -> list[tuple[Generation, IdTable | None]]:
        found = generate(share)
        for place, one in enumerate(found):
            tell(place, one)
        if choose is None:
            return [(one, None) for one in found]
        contexts = [[*p.prompt_tokens, *p.prefix_tokens] for p in share]
        sequences = [[*context, *one.tokens] for context, one in zip(contexts, found, strict=True)]
        return list(zip(found, choose(sequences, [len(context) for context in contexts]), strict=True))

    written = iter(world.spread(continued, write))
    return [
        Row(plan, [], [], truncated=plan.prefix_truncated)
        if plan.prefix_complete
        else row_of(plan, *next(written))
        for plan in plans
    ]


def to_continue(plans: Sequence[RowPlan]) -> list[RowPlan]:
    """The rows that the student continues."""
    return [plan for plan in plans if not plan.prefix_complete]


def stored_rows(
    step: int,
    *,
    prompts: Sequence[EncodedPrompt],
    store: TrajectoryStore,
    rollout: RolloutConfig,
    seed: int,
) -> list[Row]:
    """Rows of a step whose responses a student wrote once and for all."""
    rows = []
    for slot, index in enumerate(prompts_of_step(step, len(prompts), rollout.prompts_per_step, seed)):
        available = store.rows_of(prompts[index].id)
        for sample in range(rollout.samples_per_prompt):
            row_seed = derive_seed(seed, "rollout", step, slot, prompts[index].id, sample)
            trajectory = available[sample % len(available)]
            plan = RowPlan(slot, index, prompts[index].tokens, [], trajectory, False, row_seed)
            logprobs = store.sampled_logprobs(trajectory)
            rows.append(Row(plan, store.tokens(trajectory), logprobs, store.truncated(trajectory)))
    return rows
