"""The inputs of a training run: prompts and earlier stages, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.objectives.needs import TeacherNeeds
from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt
from tropd.pipeline.run.opening import role_room, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import evaluation_problems
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.stages.evaluation.held_out import tell_ungraded
from tropd.pipeline.stages.scores import check_token_ids
from tropd.pipeline.teacher.connect import teacher_fields
from tropd.pipeline.teacher.reading import AS_TEACHER, context_fields, prompts_of, scored_prompts
from tropd.pipeline.training.extrapolation.validation import Validation, read_validation
from tropd.pipeline.training.signal.from_cache import CachedScores
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.formats.trajectory_store import TrajectoryStore
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import scores_stage, stage_kind


@dataclass(frozen=True)
class Inputs:
    """Prompts, and the outputs of earlier stages."""

    prompts: list[EncodedPrompt]
    store: TrajectoryStore | None
    """Teacher trajectories, for prefixes."""
    stored: TrajectoryStore | None
    """Stored student rollouts, for objectives that train on them."""
    cached: CachedScores | None
    problems: Encoded | None
    """To evaluate on along the way."""
    validation: Validation | None = None
    """To score extrapolated weights on, where the objective extrapolates."""


def student_prompts(run: Run) -> Encoded:
    """The prompts of a training run, as student and teachers read them."""
    return prompts_of(run, "student")


def read_inputs(run: Run, needs: TeacherNeeds, found: Encoded) -> Inputs:
    """Read and check the stored trajectories and scores of these prompts.

    Raises:
        ConfigError, DataError: naming file or stage, and the command that makes it.
    """
    config, objective = run.config, run.config.objective
    tokenizer, longest = role_tokenizer(run, "student"), role_room(run, "student")
    tokens = num_tokens(tokenizer)
    prompts = found.prompts
    store = None
    if objective.schedule.kind != "none":
        manifest = finished(run, "prefixes")
        store = TrajectoryStore(run.workspace.stage("prefixes"), manifest)
        _check_prompts(run, store, prompts, "generate-prefixes")
        check_token_ids(run, store.largest_id(), tokens, "generate-prefixes")
        if objective.rollouts == "teacher":
            # A prompt whose trajectories were all filtered out has nothing to be learned from.
            prompts = [prompt for prompt in prompts if store.rows_of(prompt.id)]
            if not prompts:
                raise DataError(
                    "no training prompt has a teacher trajectory",
                    hint=f"{run.command('generate-prefixes')} --force makes them for these prompts",
                )
    stored, cached = None, None
    if needs.cached_topk:
        cached = _cache(run, "prefixes", tokens)
    if objective.rollouts == "stored":
        meta = config.reward.source == "field" and config.reward.file is None
        stored = TrajectoryStore(run.workspace.stage("rollouts"), finished(run, "rollouts"), meta=meta)
        _check_prompts(run, stored, prompts, "generate-rollouts", complete=True)
        check_token_ids(run, stored.largest_id(), tokens, "generate-rollouts")
        cached = _cache(run, "rollouts", tokens)
    problems = None
    if config.train.evaluate_every:
        problems = evaluation_problems(run, tokenizer, longest)
        tell_ungraded(run, problems.prompts)
    validation = read_validation(run, tokenizer, longest)
    return Inputs(prompts, store, stored, cached, problems, validation)


def _check_prompts(
    run: Run,
    store: TrajectoryStore,
    prompts: list[EncodedPrompt],
    command: str,
    *,
    complete: bool = False,
) -> None:
    """Stored trajectories are found by the prompt's id; they must also be answers to the prompt that has it now.

    Raises:
        DataError: an id has meant another prompt, or (with ``complete``) has no trajectory.
    """
    hint = f"{run.command(command)} --force makes them for these prompts"
    for prompt in prompts:
        rows = store.rows_of(prompt.id)
        if complete and not rows:
            raise DataError(f"prompt {prompt.id!r} has no stored trajectory", hint=hint)
        if any(store.prompt_tokens(row) != prompt.tokens for row in rows):
            raise DataError(
                f"the trajectories stored for prompt {prompt.id!r} are answers to another text: data.prompts, its "
                "chat template (or the date in it, data.template_date) or the tokenizer has changed since they were made",
                hint=hint,
            )


def _cache(run: Run, source: str, tokens: int) -> CachedScores:
    """The named teacher's scores of the trajectories that stage ``source`` has now.

    Raises:
        ConfigError: the trajectories were made anew since, or the scores are another teacher's.
    """
    stage = scores_stage(source)
    command = stage_kind(stage).command
    manifest = finished(run, stage)
    trajectories = read_manifest(run.workspace.stage(source))
    if trajectories is None or manifest.fields.get(f"upstream.{source}") != trajectories.fingerprint:
        raise ConfigError(
            f"the {stage} stage holds scores of other trajectories than {source} has now",
            hint=f"score these: {run.command(command)} --force",
        )
    told = context_fields(run, scored_prompts(run, source).prompts) if run.config.teacher.contexts else {}
    unlike = manifest.fields.keys() & {AS_TEACHER} if not told else set()
    for field, value in (teacher_fields(run) | told | dict.fromkeys(unlike)).items():
        if manifest.fields.get(field) != value:
            raise ConfigError(
                f"the {stage} stage was scored by another teacher than the one named: {field} is "
                f"{manifest.fields.get(field)!r} there and {value!r} now",
                hint=f"name that teacher, or score again: {run.command(command)} --force",
            )
    return CachedScores(run.workspace.stage(stage), manifest, tokens)
