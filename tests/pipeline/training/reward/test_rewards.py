"""Rewards of a step's rows: kept with them, refused or dropped where there is none, the same on every process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tropd.pipeline.config.sections.reward_settings import RewardConfig
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.training.reward.function import Broken, Missing
from tropd.pipeline.training.reward.judges import Judgment
from tropd.pipeline.training.reward.rewards import rows_to_train_on, step_rewards, with_rewards
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.world import ALONE
from tropd.storage.errors import TropdError

PROMPTS = [EncodedPrompt(Prompt(name, name, "1"), [1]) for name in ("first", "second")]


def row(slot: int, length: int = 2) -> Row:
    plan = RowPlan(slot, slot, [1], [], None, length == 0, seed=slot)
    return Row(plan, [5] * length, [-0.5] * length, truncated=False)


ROWS = [row(0), row(1), row(0), row(1, 0), row(1, 3)]


def judge(values: dict[int, Sequence[Any]]) -> Any:
    """Rewards by prompt; whole groups arrive."""

    def answer(groups: list[list[Row]]) -> list[list[Judgment]]:
        assert all(len({one.plan.slot for one in group}) == 1 for group in groups)
        return [list(values[group[0].plan.slot]) for group in groups]

    return answer


def rewarded(values: dict[int, Sequence[Any]], **settings: Any) -> list[Row]:
    return with_rewards(judge(values), 7, ROWS, RewardConfig(**settings), PROMPTS, ALONE)


def test_each_row_gets_its_own() -> None:
    found = rewarded({0: [1, 0.5], 1: [-1.0, True]})
    assert [one.reward for one in found] == [1.0, -1.0, 0.5, None, 1.0]
    rewards = step_rewards(found, correct_from=0.5)
    np.testing.assert_array_equal(rewards.rows, [1.0, -1.0, 0.5, np.nan, 1.0])
    assert rewards.groups.tolist() == [0, 1, 0, 1, 1]
    assert rewards.correct.tolist() == [True, False, True, False, True]
    assert rewards.tokens is None


def test_rewards_of_tokens() -> None:
    found = rewarded({0: [[0.5, None], [math.inf, 2]], 1: [[1, 1], [None, 0.0, 3.0]]}, per="token")
    assert [one.reward for one in found] == [0.5, 2.0, 2.0, None, 3.0]
    tokens = step_rewards(found, 0.5).tokens
    np.testing.assert_array_equal(tokens, [0.5, np.nan, 1.0, 1.0, np.nan, 2.0, np.nan, 0.0, 3.0])


REFUSED: list[tuple[dict[int, Sequence[Any]], dict[str, Any], str]] = [
    ({0: [1, None], 1: [1, 1]}, {}, "step 7, prompt 'first', response 2 of 2 has no reward: it is None"),
    ({0: [1, 1], 1: [1, math.nan]}, {}, "step 7, prompt 'second', response 2 of 2 has no reward: it is nan"),
    ({0: [1, 1], 1: [math.inf, 1]}, {}, "'second', response 1 of 2 has no reward: it is inf"),
    ({0: [1, Missing("too slow")], 1: [1, 1]}, {}, "'first', response 2 of 2 has no reward: too slow"),
    ({0: [1, Broken("KeyError")], 1: [1, 1]}, {"missing": "drop"}, "'first', response 2 .*failed: KeyError"),
    ({0: [1, [1.0, 1.0]], 1: [1, 1]}, {}, "the reward is a list of 2, where reward.per = 'row'"),
    ({0: [1, 1], 1: [1, 1]}, {"per": "token"}, "the reward is 1, where reward.per = 'token' needs a list"),
    ({0: [[1.0], [1.0, 1.0]], 1: []}, {"per": "token"}, "'first', response 1 of 2: 1 rewards for 2 tokens"),
    (
        {0: [[[1.0], [1.0]], [1, 1]], 1: []},
        {"per": "token"},
        "'first', response 1 of 2: the reward of a token is a",
    ),
    ({0: [[None, None], [1, 1]], 1: []}, {"per": "token"}, "none of its tokens has a reward"),
]


@pytest.mark.parametrize(("values", "settings", "message"), REFUSED)
def test_bad_rewards_are_refused_with_step_prompt_and_row(
    values: dict[int, Sequence[Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TropdError, match=message):
        rewarded(values, **settings)


def test_rows_without_a_reward_leave_the_step() -> None:
    found = rewarded({0: [1, None], 1: [Missing("too slow"), math.nan]}, missing="drop")
    kept = rows_to_train_on(found)
    assert kept == [found[0], found[3]], "the row that the student wrote nothing in has no reward to miss"
    with pytest.raises(
        TropdError, match=r"none of the 5 rows of step 7 has a reward, .*; the first: too slow"
    ):
        rewarded({0: [Missing("too slow"), None], 1: [None, None]}, missing="drop")
