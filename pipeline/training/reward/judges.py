"""The sources of rewards: the grader of the evaluation, a function of the user's, a field of stored rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from tropd.pipeline.config.schema import Config
from tropd.pipeline.objectives.objective import needs_rewards
from tropd.pipeline.problems.grading.grading import RULES, check_expected, grade
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.inputs import Inputs
from tropd.pipeline.training.reward.function import (
    Broken,
    FunctionPool,
    Missing,
    Value,
    function_folders,
    module_file,
)
from tropd.pipeline.training.reward.stored import check_stored, stored_rewards
from tropd.pipeline.training.rollout.rows import Row
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import DataError
from tropd.storage.stage.fingerprint import Scalar

LOG = "reward.log"
"""File of the workspace's logs for what a reward function prints."""

Group = list[Row]
Judgment = Value | Missing | Broken
Judge = Callable[[list[Group]], list[list[Judgment]]]
"""Rewards of the rows of each group, in order."""


def reward_fields(run: Run) -> dict[str, Scalar]:
    """Fingerprint fields of everything that decides rewards, where the objective looks at them.

    Of a function it is the source of its module, not of those that it imports.
    """
    reward, evaluation = run.config.reward, run.config.evaluation
    if not needs_rewards(run.config.objective):
        return {}
    fields: dict[str, Scalar] = {
        f"reward.{name}": getattr(reward, name) for name in ("source", "per", "missing", "correct_from")
    }
    if reward.function is not None:
        fields["reward.function"] = reward.function
        fields["reward.function_source"] = content_digest(
            module_file(reward.function, function_folders(run.workspace.root))
        )
    if reward.field is not None:
        fields["reward.field"] = reward.field
    if reward.file is not None:
        fields["reward.file"] = content_digest(run.workspace.resolve(reward.file))
    if reward.source == "grader":
        fields["evaluation.grader"] = evaluation.grader
        fields["evaluation.grading_rules"] = RULES
        if evaluation.grader == "pattern":
            fields["evaluation.answer_pattern"] = evaluation.answer_pattern
    return fields


def open_judge(run: Run, stack: ExitStack, inputs: Inputs, tokenizer: Any) -> Judge | None:
    """The source of rewards, checked; None where the objective looks at none. Its processes end with ``stack``.

    Raises:
        ConfigError: the function cannot be imported.
        DataError: a prompt has no answer to grade with.
    """
    config = run.config
    if not needs_rewards(config.objective):
        return None
    if config.reward.source == "field":
        assert inputs.stored is not None
        assert config.reward.field is not None
        file = None if config.reward.file is None else run.workspace.resolve(config.reward.file)
        reward_of = stored_rewards(inputs.stored, config.reward.field, file)
        if config.reward.missing == "refuse":
            check_stored(inputs.stored, reward_of)
        return lambda groups: [[reward_of(row.plan.trajectory or 0) for row in group] for group in groups]
    if config.reward.source == "grader":
        check_answers(run, [one.prompt for one in inputs.prompts])
        return lambda groups: _graded(config, inputs, tokenizer, groups)
    assert config.reward.function is not None
    folders, log = function_folders(run.workspace.root), run.workspace.logs / LOG
    module_file(config.reward.function, folders)
    pool = FunctionPool(
        config.reward.function, folders, log, workers=config.reward.workers, seconds=config.reward.seconds
    )
    stack.callback(pool.close)
    pool.check()
    return lambda groups: _called(pool, config, inputs, tokenizer, groups)


def check_answers(run: Run, prompts: Sequence[Prompt]) -> None:
    """Refuse training prompts that the grader cannot grade, or count them where their rows may be dropped.

    Raises:
        DataError: naming the first of them.
    """
    check_expected(run.config.evaluation.grader, prompts)
    without = [prompt for prompt in prompts if prompt.answer is None]
    if not without:
        return
    field = run.config.data.answer_field
    counted = f"{len(without)} of {len(prompts)} training prompts have no answer in field {field!r}"
    if run.config.reward.missing == "refuse" or len(without) == len(prompts):
        first = without[0]
        raise DataError(
            f"{counted}, which reward.source = 'grader' needs; the first is prompt {first.id!r} (line {first.line} of "
            f"{run.config.data.prompts})",
            hint='add the answers, set data.answer_field, leave these rows out with reward.missing = "drop", or set '
            "another reward.source",
        )
    run.reporter.warning(f"train: {counted}: their rows have no reward and leave each step (reward.missing)")


def _graded(config: Config, inputs: Inputs, tokenizer: Any, groups: list[Group]) -> list[list[Judgment]]:
    rows = [row for group in groups for row in group]
    answers = [inputs.prompts[row.plan.prompt_index].prompt.answer for row in rows]
    marks = grade(
        [_text(tokenizer, row) for row in rows],
        answers,
        config.evaluation,
        cut_off=[row.truncated for row in rows],
    )
    each: Iterator[Judgment] = (
        Missing(f"its prompt has no answer in field {config.data.answer_field!r}")
        if answer is None
        else float(mark.correct)
        for mark, answer in zip(marks, answers, strict=True)
    )
    return [[next(each) for _ in group] for group in groups]


def _called(
    pool: FunctionPool, config: Config, inputs: Inputs, tokenizer: Any, groups: list[Group]
) -> list[list[Judgment]]:
    batches: list[list[Group]] = [[]]
    for group in groups:
        if sum(map(len, batches[-1])) >= config.reward.batch_rows:
            batches.append([])
        batches[-1].append(group)
    asked = [
        [_record(inputs, tokenizer, row) for group in batch for row in group] for batch in batches if batch
    ]
    rewards: list[Judgment] = []
    for answer, rows in zip(pool.call(asked), asked, strict=True):
        rewards += answer if isinstance(answer, list) else [answer] * len(rows)
    each = iter(rewards)
    return [[next(each) for _ in group] for group in groups]


def _record(inputs: Inputs, tokenizer: Any, row: Row) -> dict[str, Any]:
    """What a reward function learns of a row."""
    prompt = inputs.prompts[row.plan.prompt_index].prompt
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "messages": [dict(turn) for turn in prompt.turns],
        "answer": prompt.answer,
        "domain": prompt.domain,
        "response": _text(tokenizer, row),
        "token_ids": list(row.tokens),
        "truncated": row.truncated,
    }


def _text(tokenizer: Any, row: Row) -> str:
    """The response, teacher's prefix included, without the token that ends it."""
    tokens = [*row.plan.prefix_tokens, *row.tokens]
    if not row.truncated:
        tokens = tokens[:-1]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
