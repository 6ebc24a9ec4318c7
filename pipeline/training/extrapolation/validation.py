"""The held-out problems by which extrapolated weights are accepted, read before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tropd.pipeline.config.sections.evaluation_settings import EvaluationConfig
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.grading.grading import RULES
from tropd.pipeline.run.identity import section_fields
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import data_fields, evaluation_problems, evenly
from tropd.pipeline.stages.evaluation.held_out import HeldOut, held_out_prompts
from tropd.storage.errors import DataError
from tropd.storage.stage.fingerprint import Scalar

DECIDING = ("temperature", "top_p", "grader", "answer_pattern")
"""Settings of an evaluation set that accuracies depend on, besides the length of responses."""


@dataclass(frozen=True)
class Validation:
    """Problems to score weights on: with answers, or with their teachers."""

    settings: EvaluationConfig
    """Of their evaluation set."""
    problems: list[EncodedPrompt]
    """With an answer each; none where the score is the distance to the teacher."""
    prompts: HeldOut
    """With a teacher each; none where the score is the accuracy."""


def read_validation(run: Run, tokenizer: Any, longest: int) -> Validation | None:
    """The problems of ``objective.extrapolation``, spread over all of their set; None without extrapolation.

    Args:
        longest: tokens that the student takes.

    Raises:
        ConfigError, DataError: the set cannot be read, or has no answers where these are needed.
    """
    extrapolation = run.config.objective.extrapolation
    if extrapolation is None:
        return None
    name = extrapolation.problems
    settings = run.config.evaluation_sets[name]
    by_teacher = extrapolation.score == "reverse_kl"
    found = evaluation_problems(run, tokenizer, longest, name, unanswered=by_teacher)
    if not name:
        run.reporter.warning(
            f"weights are chosen on {extrapolation.most} or fewer of the problems that the run is evaluated on "
            f"({run.config.data.evaluation}), so its accuracy on them flatters it: objective.extrapolation.problems "
            "names another set, one of evaluation.benchmarks"
        )
    if by_teacher:
        return Validation(settings, [], held_out_prompts(run, found, extrapolation.most))
    graded = [one for one in found.prompts if one.prompt.answer is not None]
    if not graded:
        raise DataError(
            f"{run.config.problem_files[name].evaluation}: no problem has an answer, and objective.extrapolation.score = "
            "'accuracy' needs some",
            hint="set objective.extrapolation.score = 'reverse_kl', or data.answer_field",
        )
    return Validation(settings, [graded[i] for i in evenly(len(graded), extrapolation.most)], HeldOut([], []))


def validation_fields(run: Run) -> dict[str, Scalar]:
    """Fingerprint fields of the extrapolation and all that its scores depend on besides models; none without it."""
    extrapolation = run.config.objective.extrapolation
    if extrapolation is None:
        return {}
    name = extrapolation.problems
    settings = run.config.evaluation_sets[name]
    fields = dict(data_fields(run, "evaluation", name))
    fields["evaluation.limit"] = settings.limit
    # Responses to held-out prompts are as long as those of [evaluation] itself.
    fields["evaluation.max_tokens"] = run.config.evaluation_max_tokens
    if extrapolation.score == "accuracy":
        fields["evaluation.max_tokens"] = settings.max_tokens or run.config.rollout.max_tokens
        fields |= {f"evaluation.{field}": getattr(settings, field) for field in DECIDING}
        fields["evaluation.grading_rules"] = RULES
    own = section_fields("objective.extrapolation", extrapolation)
    return own | {f"validation.{field}": value for field, value in fields.items()}
