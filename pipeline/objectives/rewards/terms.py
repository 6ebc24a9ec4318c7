"""The part of a row's reward in the loss, as data: terms that are added to the advantages of K1.

The formulas are in ``advantages.py``; ``partition.rule = "reward"`` and the token weight ``dual_perplexity`` look at
rewards too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tropd.pipeline.objectives.spec import MOST_FACTOR, Spec


class GroupAdvantage(Spec):
    """Mix with rewards: distillation·A + weight·(reward - mean of the prompt's rows) on every token (GRPO)."""

    kind: Literal["group"] = "group"
    standardize: bool = True
    """Divide by the standard deviation of the prompt's rows too (GRPO); false: the difference itself (Dr. GRPO)."""
    weight: float = Field(default=1.0, ge=0.0, le=MOST_FACTOR)
    """Factor on the advantage of the reward; at 0 no reward is asked for."""
    distillation: float = Field(default=1.0, ge=0.0, le=MOST_FACTOR)
    """Factor on the teacher's advantage; at 0 the teacher is not asked where nothing else needs it."""


class GroupMargin(Spec):
    """Where a prompt's right rows lead its wrong ones by less than the margin in mean advantage, shift both (Uni-OPD)."""

    kind: Literal["margin"] = "margin"
    margin: float = Field(default=0.4, gt=0.0, le=MOST_FACTOR)
    """δ: least difference of mean advantages, right rows minus wrong rows, in nats."""


RewardTerm = Annotated[GroupAdvantage | GroupMargin, Field(discriminator="kind")]
