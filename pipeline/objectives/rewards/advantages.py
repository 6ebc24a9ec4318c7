"""Formulas over the rewards of a step's rows: advantages of groups, margins, weights by perplexity (numpy, float64).

Legend: R rows of the step · T student tokens, in row order. A group is the rows of one prompt. A row without tokens of
the student (its prefix was a whole response) has the reward NaN and belongs to no group's statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tropd.storage.arrays import Floats64, Ints

Bools = npt.NDArray[np.bool_]

LEAST_SPREAD = 1e-6
"""Added to a group's standard deviation, as verl does, so that nothing is divided by 0."""


@dataclass(frozen=True)
class StepRewards:
    """Rewards of a step."""

    rows: Floats64
    """``[R]``; NaN for a row in which the student wrote nothing."""
    groups: Ints
    """``[R]`` number of the prompt that each row answers."""
    correct: Bools
    """``[R]`` whether the reward reaches ``reward.correct_from``."""
    tokens: Floats64 | None = None
    """``[T]`` rewards of single tokens, NaN where a token has none; None: rewards are for whole rows."""


def group_advantages(rewards: Floats64, groups: Ints, *, standardize: bool) -> Floats64:
    """``[R]`` reward minus its group's mean, divided by (σ + 1e-6) of the group where asked for (GRPO, arXiv 2402.03300).

    σ is the sample standard deviation (n - 1), as in the published implementations. A group of one row has advantage 0,
    and so has one without spread. NaN rewards have advantage 0 and count in no group.
    """
    known = ~np.isnan(rewards)
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups[known]):
        own = known & (groups == group)
        centered = rewards[own] - rewards[own].mean()
        # Equal rewards differ from their mean by rounding, which a division by 1e-6 would make visible.
        if len(centered) < 2 or np.ptp(rewards[own]) == 0:
            continue
        if standardize:
            centered = centered / (rewards[own].std(ddof=1) + LEAST_SPREAD)
        advantages[own] = centered
    return advantages


def process_advantages(rewards: Floats64, rows: Ints, groups: Ints, *, standardize: bool) -> Floats64:
    """``[T]`` for rewards of tokens: the sum of the normalized rewards of this token and the row's later ones
    (GRPO with process supervision, arXiv 2402.03300, section 4.1.3).

    Args:
        rewards: ``[T]``, NaN where a token has none: those are in no mean.
        rows, groups: ``[T]`` row and prompt of each token.
    """
    normalized = group_advantages(rewards, groups, standardize=standardize)
    parts = np.split(normalized, np.flatnonzero(np.diff(rows)) + 1)
    return np.concatenate([np.cumsum(part[::-1])[::-1] for part in parts])


def margin_shifts(advantages: Floats64, rows: Ints, rewards: StepRewards, margin: float) -> Floats64:
    """``[R]`` what is added to all advantages of a row, so that a prompt's right rows lead by the margin (Uni-OPD).

    A row's advantage is the mean of its tokens', a prompt's the mean of its rows'. If right minus wrong falls short of
    the margin by s, right rows get s/2 and wrong ones -s/2; a prompt with only one kind of rows gets nothing
    (arXiv 2605.03677, group scope, mean mode, direction "both").
    """
    count = np.bincount(rows, minlength=len(rewards.rows))
    means = np.bincount(rows, weights=advantages, minlength=len(rewards.rows)) / np.maximum(count, 1)
    known = (count > 0) & ~np.isnan(rewards.rows)
    shifts = np.zeros(len(rewards.rows))
    for group in np.unique(rewards.groups[known]):
        own = known & (rewards.groups == group)
        right, wrong = own & rewards.correct, own & ~rewards.correct
        if right.any() and wrong.any():
            short = max(0.0, margin - (means[right].mean() - means[wrong].mean()))
            shifts[right], shifts[wrong] = short / 2, -short / 2
    return shifts


def dual_perplexity(
    student_logprobs: Floats64,
    teacher_logprobs: Floats64,
    rows: Ints,
    rewards: StepRewards,
    temperature: float,
) -> Floats64:
    """``[R]`` weights with mean 1 over a prompt's right rows, and over its wrong rows (SCOPE, arXiv 2604.10688).

    Right rows weigh as PPL_S^(1/τ), wrong rows as PPL_T^(-1/τ), where a row's PPL is e to the negative mean log-prob of
    its tokens: right answers that the student finds unusual, and wrong ones that the teacher can follow.
    """
    count = np.maximum(np.bincount(rows, minlength=len(rewards.rows)), 1)
    student, teacher = (
        np.bincount(rows, weights=logprobs, minlength=len(rewards.rows)) / count
        for logprobs in (student_logprobs, teacher_logprobs)
    )
    scores = np.where(rewards.correct, -student, teacher) / temperature
    weights = np.ones(len(rewards.rows))
    known = ~np.isnan(rewards.rows)
    for group in np.unique(rewards.groups[known]):
        for path in (rewards.correct, ~rewards.correct):
            own = known & (rewards.groups == group) & path
            if own.any():
                shares = np.exp(scores[own] - scores[own].max())
                weights[own] = shares * (own.sum() / shares.sum())
    return weights
