"""Rewards of a step's rows: asked for when the responses are complete, checked, kept with the rows.

The rows of one prompt stay together on their way to the function. Every process of a run ends up with all rows and all
rewards, so that a group's statistics are those of the whole group wherever its rows were sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tropd.pipeline.config.sections.reward_settings import RewardConfig
from tropd.pipeline.objectives.rewards.advantages import StepRewards
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.training.reward.function import Broken, Missing
from tropd.pipeline.training.reward.judges import Judge, Judgment
from tropd.pipeline.training.rollout.rows import Row
from tropd.pipeline.training.world import World
from tropd.storage.errors import TropdError


def with_rewards(
    judge: Judge,
    step: int,
    rows: list[Row],
    config: RewardConfig,
    prompts: Sequence[EncodedPrompt],
    world: World,
) -> list[Row]:
    """The rows with their rewards. A row without any keeps None, if ``reward.missing`` allows it.

    Raises:
        TropdError: naming step, prompt and row: the function failed, or a row has no reward and must have one; or none
            has one.
    """
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row.tokens:
            groups.setdefault(row.plan.slot, []).append(index)
    answers = world.spread([[rows[i] for i in group] for group in groups.values()], judge)
    found = list(rows)
    for group, values in zip(groups.values(), answers, strict=True):
        for place, (index, value) in enumerate(zip(group, values, strict=True)):
            prompt = prompts[rows[index].plan.prompt_index]
            where = f"step {step}, prompt {prompt.id!r}, response {place + 1} of {len(group)}"
            found[index] = _rewarded(rows[index], value, where, config)
    if answers and all(row.reward is None for row in found):
        raise TropdError(
            f"none of the {len(rows)} rows of step {step} has a reward, so it has nothing to learn from; the first: "
            f"{_reason(answers[0][0])}",
            hint="check the source of rewards on this run's own responses; train/samples.jsonl has some",
        )
    return found


def rows_to_train_on(rows: Sequence[Row]) -> list[Row]:
    """Those with a reward, and those in which the student wrote nothing."""
    return [row for row in rows if row.reward is not None or not row.tokens]


def step_rewards(rows: Sequence[Row], correct_from: float) -> StepRewards:
    """Rewards of rows that have one each, or no tokens."""
    rewards = np.array([np.nan if row.reward is None else row.reward for row in rows], dtype=np.float64)
    rewards[[not row.tokens for row in rows]] = np.nan
    tokens = None
    if any(row.token_rewards is not None for row in rows):
        tokens = np.concatenate([np.asarray(row.token_rewards or [], dtype=np.float64) for row in rows])
    return StepRewards(
        rows=rewards,
        groups=np.array([row.plan.slot for row in rows], dtype=np.int64),
        correct=np.nan_to_num(rewards, nan=-np.inf) >= correct_from,
        tokens=tokens,
    )


def _rewarded(row: Row, value: Judgment, where: str, reward: RewardConfig) -> Row:
    if isinstance(value, Broken):
        raise TropdError(
            f"{where}: reward.function = {reward.function!r} failed: {value.reason}",
            hint="mend the function and run again: the run resumes from its last checkpoint (a changed module is another "
            "reward: --force starts over with it). What it printed is in logs/reward.log",
        )
    per_token = reward.per == "token"
    if isinstance(value, list) != per_token and not isinstance(value, Missing) and value is not None:
        got = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        due = "list" if per_token else "number"
        raise TropdError(
            f"{where}: the reward is {got}, where reward.per = {reward.per!r} needs a {due}",
            hint=f"set reward.per = {'row' if per_token else 'token'!r}, or change the source of rewards",
        )
    if isinstance(value, list):
        if len(value) != len(row.tokens):
            raise TropdError(
                f"{where}: {len(value)} rewards for {len(row.tokens)} tokens",
                hint='with reward.per = "token" a row has one reward (or null) for each of its token_ids',
            )
        if any(isinstance(one, list) for one in value):
            raise TropdError(
                f"{where}: the reward of a token is a list, where a number or null is due",
                hint="return one list of numbers for each row",
            )
        each = [math.nan if one is None or not math.isfinite(one) else float(one) for one in value]
        known = [one for one in each if not math.isnan(one)]
        if known:
            return replace(row, reward=math.fsum(known), token_rewards=each)
        value = Missing("none of its tokens has a reward that is a number")
    if isinstance(value, float | int) and math.isfinite(value):
        return replace(row, reward=float(value))
    if reward.missing == "drop":
        return row
    raise TropdError(
        f"{where} has no reward: {_reason(value)}",
        hint='mend the source of rewards and run again, or leave such rows out: reward.missing = "drop"',
    )


def _reason(value: Judgment) -> str:
    return value.reason if isinstance(value, Broken | Missing) else f"it is {value}"
