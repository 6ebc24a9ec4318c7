"""Settings of rewards: where they come from, and the rows that have none."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tropd.pipeline.config.sections.value_types import MOST_ROWS, WEEK
from tropd.pipeline.objectives.spec import MOST_FACTOR, Inert, Spec


class RewardConfig(Spec):
    """Rewards of the student's responses, for objectives that look at them (scope, uni-opd, grpo, ...)."""

    source: Literal["grader", "function", "field"] = "grader"
    """`grader`: 1 where evaluation.grader finds the prompt's answer in the response, else 0; `function`: code of your
    own, reward.function; `field`: reward.field of stored rollouts (objective.rollouts = "stored")."""
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:name` of a Python function: a list of rows in, a list of numbers out (None: no reward). It is code of your
    own, runs in processes of its own with your rights, and is looked for in the workspace, then in the current folder."""
    field: str | None = Field(default=None, min_length=1)
    """Field of stored rollouts that has the reward: a number, or with per = "token" a list of numbers."""
    file: str | None = Field(default=None, min_length=1)
    """Records with prompt_id, sample_index and reward.field, one for each stored rollout (JSON lines, a JSON array,
    Parquet or CSV); a relative path is inside the workspace. If not set, the field is in the rollouts' own `meta`."""
    per: Literal["row", "token"] = "row"
    """A reward per row, or a list of rewards per row, one for each of its token ids (null: none at this token)."""
    missing: Literal["refuse", "drop"] = "refuse"
    """A row without a reward (no answer to grade with, None, NaN, or out of time) stops the run, or leaves the step; the
    metric rows_without_reward counts those that left."""
    correct_from: float = Field(default=0.5, ge=-MOST_FACTOR, le=MOST_FACTOR)
    """A row is right if its reward is at least this, for the parts of an objective that tell right from wrong."""
    seconds: Inert[float] = Field(default=60.0, gt=0.0, le=WEEK)
    """Longest time that one call of reward.function may take; then it is ended, and its rows have no reward."""
    workers: Inert[int] = Field(default=2, ge=1, le=256)
    """Processes that call reward.function, per training process."""
    batch_rows: Inert[int] = Field(default=64, ge=1, le=MOST_ROWS)
    """Rows per call of reward.function, at least; the rows of one prompt are never split."""
