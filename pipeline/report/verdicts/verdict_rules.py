"""Rules of the report's verdicts: conditions, figures and advice in one place.

docs/troubleshooting.md has the same table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Level = Literal["problem", "warning"]


@dataclass(frozen=True)
class Limits:
    """Figures that verdicts compare with. Shares are from 0 to 1, entropies and KLs nats per token."""

    fewest_problems: int = 8
    """Fewer evaluated problems than this say nothing."""
    fewest_steps: int = 15
    """Fewer training steps than this (with the metric in question) have no trend."""
    part: float = 0.2
    """Share of the steps at either end that a trend is taken from."""
    with_prefix: float = 0.1
    """Steps with a larger share of teacher prefix in their responses are no part of a trend: their student tokens
    come after text of the teacher, which is easier."""
    unanswered: float = 0.9
    right: float = 0.01
    behind: float = 0.1
    teacher_cut: float = 0.5
    cut: float = 0.9
    closer: float = 0.05
    same: float = 0.01
    fell: float = 0.02
    constant: float = 0.6
    above_expected: float = 0.3
    kept_mass: float = 0.85
    no_student: float = 0.3
    fewest_distances: int = 3
    again: float = 1.2
    again_rise: float = 0.1
    entropy_factor: float = 2.0
    entropy_rise: float = 0.5
    entropy_low: float = 0.05
    acceptance_low: float = 0.8
    accepted: float = 0.4
    far: float = 3.0
    accepted_rise: float = 0.05
    outlier_factor: float = 1.5
    outlier_rise: float = 0.1
    k1_factor: float = 1.5
    k1_rise: float = 0.3
    loss_factor: float = 2.0
    loss_rise: float = 1.0
    clipped: float = 0.95
    clip_factor: float = 10.0
    difference: float = 1.0
    retried: float = 0.1
    fewest_retried: int = 5
    alike: float = 0.9


LIMITS = Limits()


@dataclass(frozen=True)
class Rule:
    """One kind of verdict. ``condition`` says when it is given, with fields of ``Limits`` in braces."""

    level: Level
    condition: str
    advice: str

    def threshold(self, limits: Limits = LIMITS) -> str:
        """The condition with its figures."""
        return self.condition.format(**vars(limits)).replace("% points", " points").replace("%", " %")


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "grader-misfit": Rule(
            "problem",
            "the grader finds no answer in {unanswered:.0%} or more of the teacher's responses that are not cut off "
            "(where the teacher is not evaluated: of the student's, before and after training)",
            "Choose the `evaluation.grader` that fits (`pattern` with `evaluation.answer_pattern`, `math`, `choice` or "
            "`exact`); `tropd config explain evaluation.grader` explains each.",
        ),
        "teacher-wrong": Rule(
            "problem",
            "the teacher has {right:.0%} right or less, of {fewest_problems} problems or more, and is not cut off",
            "Compare its responses with the expected answers: `evaluation.grader`, `data.answer_field`, `data.template` "
            "and `data.chat` (on for a chat model) are the usual causes. Accuracy says nothing until then.",
        ),
        "teacher-behind": Rule(
            "problem",
            "the teacher is {behind:.0%} points or more below the student before training, with intervals that do not "
            "overlap",
            "Check `teacher.model`, `teacher.dtype`, `data.chat`, or take a better teacher: the student would unlearn.",
        ),
        "short-limit": Rule(
            "warning",
            "{teacher_cut:.0%} or more of the teacher's evaluated responses reach the length limit",
            "Raise `rollout.max_tokens` (and `evaluation.max_tokens`, `prefixes.max_tokens` where they are set), or "
            "check that responses can end at all (`rollout.stop_ids`).",
        ),
        "never-stops": Rule(
            "problem",
            "{cut:.0%} or more of the trained student's evaluated responses, or of those in the last {part:.0%} of the "
            "steps, reach the length limit, and the teacher's do not",
            "Check that the student can end a response (`rollout.stop_ids`, its `generation_config.json`) and the room "
            'for it (`rollout.max_tokens`); then more `train.steps`, prefixes (`objective.name = "tropd"`), a larger '
            "`objective.guidance.weight`, or `tropd sft` first.",
        ),
        "no-answers": Rule(
            "problem",
            "the grader finds no answer in {unanswered:.0%} or more of the trained student's responses that are not cut "
            "off, but does in the teacher's",
            "See how its responses end: more `rollout.max_tokens` where they are cut off, a lower `train.learning_rate` "
            "where they are no longer language, more `train.steps` where it has not learned the format yet.",
        ),
        "not-closer": Rule(
            "problem",
            "the reverse KL to the teacher on held-out prompts was above {same:g} nats before training, and is not "
            "{closer:.0%} below that after it",
            "Another `train.learning_rate` (higher where nothing moves, lower where K1 rises), more `train.steps`, or "
            '`objective.name = "tropd-cached"`.',
        ),
        "accuracy-fell": Rule(
            "warning",
            "accuracy is {fell:.0%} points or more below what it was before training, by more than chance (95%)",
            "Lower `train.learning_rate`, or a larger `objective.guidance.weight`; see where responses went wrong on the "
            "report's page.",
        ),
        "constant-answer": Rule(
            "problem",
            "one answer is {constant:.0%} or more of the trained student's, and {above_expected:.0%} points more than "
            "the commonest expected one",
            '`objective.name = "tropd"` or `"tropd-cached"`, a lower `train.learning_rate`, or `tropd sft` first: it has '
            "collapsed, and is right only where that answer happens to be.",
        ),
        "kept-mass": Rule(
            "warning",
            "the teacher cache keeps less than {kept_mass:.0%} of the teacher's probability",
            "Raise `scores.k` (and `objective.k`), and score again with `--force`.",
        ),
        "no-student-token": Rule(
            "warning",
            "in {no_student:.0%} or more of the planned steps no response has a token of the student's; where fewer than "
            "{fewest_steps} are planned, in all",
            'Whichever of these is not set yet: `objective.schedule.unit = "trajectory"`, `objective.schedule.length = '
            '"uniform"`, a smaller `objective.schedule.fraction`, more `train.steps`.',
        ),
        "distance-grew": Rule(
            "warning",
            "of {fewest_distances} or more measurements of the reverse KL on held-out prompts in training, the last is "
            "{again:g} times the least and {again_rise:g} nats more",
            "Stop earlier (`train.steps`), lower `train.learning_rate`, or let it fall (`train.schedule`).",
        ),
        "entropy-rising": Rule(
            "warning",
            "the student's entropy is {entropy_factor:g} times its early value, and {entropy_rise:g} nats more",
            "Lower `train.learning_rate`, or a larger `objective.guidance.weight`: the student becomes undecided.",
        ),
        "entropy-collapsed": Rule(
            "problem",
            "in the last {part:.0%} of the steps the student's entropy is below {entropy_low:g} nats, and the teacher "
            "accepts less than {acceptance_low:.0%}",
            'Lower `train.learning_rate`, `objective.name = "tropd"` or `"tropd-cached"`, or `tropd sft` first: it no '
            "longer tries anything else.",
        ),
        "teacher-rejects": Rule(
            "problem",
            "in the last {part:.0%} of the steps the teacher accepts less than {accepted:.0%} of what the student "
            "writes, and not {accepted_rise:.0%} points more than in the first",
            "Lower `train.learning_rate`, a larger `objective.guidance.weight`, or `tropd sft` first.",
        ),
        "far-from-teacher": Rule(
            "problem",
            "in the last {part:.0%} of the steps K1 is still {far:g} nats per token or more",
            'Prefixes and a forward KL, which show the student what to do instead (`objective.name = "tropd"`, '
            '`"tropd-cached"` or `"full-fkl"`), or `tropd sft` first.',
        ),
        "outliers-growing": Rule(
            "warning",
            "the share of outliers among the student's tokens is {outlier_factor:g} times its early value, and "
            "{outlier_rise:.0%} points more",
            'Lower `train.learning_rate`, a larger `objective.guidance.weight`, or `objective.name = "tropd-cached"`.',
        ),
        "k1-rising": Rule(
            "problem",
            "K1 is {k1_factor:g} times its early value, and {k1_rise:g} nats more",
            'Lower `train.learning_rate`, or `objective.name = "tropd-cached"`: the student moves away from the teacher.',
        ),
        "loss-rising": Rule(
            "warning",
            "the loss is {loss_factor:g} times its early value, and {loss_rise:g} more",
            "Lower `train.learning_rate`; `train.warmup_steps` helps where the rise comes at the start.",
        ),
        "gradient-clipped": Rule(
            "warning",
            "in {clipped:.0%} or more of the second half's steps the gradient is clipped, and at the median its norm is "
            "{clip_factor:g} times `train.max_grad_norm`",
            "Lower `train.learning_rate`, and see that K1 falls; raise `train.max_grad_norm` only where it does.",
        ),
        "sampler-mismatch": Rule(
            "warning",
            "sampler and trainer are, at the median of the last {part:.0%} of the steps, {difference:g} nat or more "
            "apart on the log-prob of some token",
            '`student.dtype = "float32"`, `train.max_staleness = 0`, or `train.importance_clip`, which corrects for it.',
        ),
        "rewards-alike": Rule(
            "problem",
            "an objective compares the rewards of a prompt's responses, and they are the same for {alike:.0%} or more of "
            "the prompts, over all steps and in the first {part:.0%} of them",
            "Where rewards are all lowest, easier prompts or `tropd sft` first; where all are highest, harder ones; else "
            "a source of rewards that tells responses apart (`reward.source`), or more `rollout.samples_per_prompt`.",
        ),
        "teacher-retries": Rule(
            "warning",
            "requests to the teacher were repeated in {retried:.0%} or more of the steps, and in {fewest_retried}",
            "The service is overloaded or dies: read its log in the workspace's `logs`, lower `service.batch_tokens`, or "
            "name more servers in `teacher.url`.",
        ),
    }
)
