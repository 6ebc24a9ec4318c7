"""The ``train`` stage on disk: its fingerprint, its opening by the writing process, the check of a finished one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.run.identity import (
    IMPORTANCE_CLIP,
    engine_fields,
    fingerprint_of,
    model_fields,
    section_fields,
    stop_fields,
    tell_unrecorded,
    token_fields,
)
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import data_fields
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.teacher.connect import teacher_fields
from tropd.pipeline.teacher.reading import context_fields
from tropd.pipeline.training.extrapolation.validation import validation_fields
from tropd.pipeline.training.record.final_model import FINAL
from tropd.pipeline.training.reward.judges import reward_fields
from tropd.storage.formats.step_log import log_problems
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import check_shard
from tropd.storage.stage.stage import Stage, open_stage

STAGE = "train"


def fingerprint(run: Run, prompts: Encoded) -> Fingerprint:
    """Everything that decides the final weights of a student trained on these prompts."""
    config = run.config
    needs = teacher_needs(config.objective)
    fields = data_fields(run, "prompts") | token_fields(prompts, "data.prompts")
    fields |= model_fields(run, "student") | stop_fields(run, "student") | teacher_fields(run)
    fields |= context_fields(run, prompts.prompts)
    if config.teacher.follow is not None:
        fields |= section_fields("teacher.follow", config.teacher.follow)
    fields |= section_fields("objective", config.objective)
    if config.objective.reward is not None:
        fields |= section_fields("objective.reward", config.objective.reward)
    fields |= reward_fields(run) | validation_fields(run)
    fields |= section_fields("rollout", config.rollout) | section_fields("train", config.train)
    fields |= engine_fields(run, "student")
    if config.student.lora is not None:
        fields |= section_fields("student.lora", config.student.lora)
    if config.train.dropout:
        # The dropped activations depend on how a step is cut up.
        fields |= {"train.dropout": True, "train.micro_batch_tokens": config.train.micro_batch(0)}
    if config.rollouts_differ:
        fields[IMPORTANCE_CLIP] = config.train.importance_clip
    fields["run.seed"] = config.run.seed
    if config.objective.schedule.kind != "none":
        fields["upstream.prefixes"] = finished(run, "prefixes").fingerprint
    if needs.cached_topk:
        fields["upstream.scores"] = finished(run, "scores").fingerprint
    if config.objective.rollouts == "stored":
        fields["upstream.rollout-scores"] = finished(run, "rollout-scores").fingerprint
    return fingerprint_of(run, fields)


def rounding_settings(run: Run) -> dict[str, Scalar]:
    """Settings on which only the rounding of a run depends: not in its fingerprint, but in its checkpoints."""
    config = run.config
    settings: dict[str, Scalar] = {"train.micro_batch_tokens": config.train.micro_batch_tokens}
    if config.objective.rollouts != "stored" and teacher_needs(config.objective).token_logprobs:
        settings["service.batch_tokens"] = config.service.batch_tokens
    return settings


def tell_rounding(run: Run, before: Mapping[str, Scalar]) -> None:
    """Warn where a run resumes with other settings than ``before``, those of its checkpoint, and so rounds otherwise."""
    changed = [
        f"{name} is {_shown(now)} now, and was {_shown(before[name])}"
        for name, now in rounding_settings(run).items()
        if name in before and before[name] != now
    ]
    if changed:
        run.reporter.warning(
            f"train: {'; '.join(changed)}: the remaining steps are rounded otherwise, so the last digits of the weights "
            "are not those of a run with one value"
        )


def _shown(value: Scalar) -> str:
    return "not set" if value is None else str(value)


@contextmanager
def open_train_stage(run: Run, prompts: Encoded, force: bool) -> Iterator[Stage]:
    """Open the stage for writing.

    Raises:
        FingerprintMismatchError, StageLockedError: see ``open_stage``.
    """
    folder = run.workspace.stage(STAGE)
    with open_stage(folder, STAGE, fingerprint(run, prompts), force=force, timings=run.timings) as stage:
        own = run.config.objective.importance.clip
        if IMPORTANCE_CLIP in stage.unrecorded and not stage.complete and own is None:
            run.reporter.warning(
                f"{stage.folder} was begun by an older version of tropd, which did not weight responses sampled in "
                "bfloat16: the remaining steps are weighted (train.importance_clip)"
            )
        stage.unrecorded = [name for name in stage.unrecorded if name != IMPORTANCE_CLIP]
        tell_unrecorded(run, stage)
        if run.config.objective.own_context and not run.config.teacher.contexts:
            run.reporter.warning(
                f"objective {run.config.objective.name!r} is meant for a teacher that is told more than the student; "
                "teacher.context is not set, so it reads the student's prompts"
            )
        yield stage


def check_finished(run: Run, stage: Stage) -> None:
    """Check that the final model of an ended run is as written; warn of damaged logs, on which no weight depends.

    Raises:
        DamagedShardError: it is not.
    """
    check_shard(stage.folder, stage.manifest.shards[FINAL])
    for name, problem in log_problems(stage.folder, stage.manifest):
        run.reporter.warning(f"train: {stage.folder / name}: {problem}; weights do not depend on it")
