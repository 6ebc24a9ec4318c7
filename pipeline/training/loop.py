"""Stage 3, ``train``: take a prepared step, update the student; checkpointed, resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from tropd.pipeline.config import TrainConfig, to_plain
from tropd.pipeline.context import (
    Run,
    engine_fields,
    finished,
    model_fields,
    section_fields,
)
from tropd.pipeline.identity import (
    IMPORTANCE_CLIP,
    fingerprint_of,
    stop_fields,
    tell_unrecorded,
    token_fields,
)
from tropd.pipeline.memory import within_memory
from tropd.pipeline.models import pick_device
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.problems.selection import data_fields
from tropd.pipeline.progress import SILENT
from tropd.pipeline.teacher.connection import check_pairs, teacher_fields
from tropd.pipeline.training.agreement import check_engine
from tropd.pipeline.training.along import evaluate_student
from tropd.pipeline.training.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    load_rows,
    newest_checkpoint,
    prune_checkpoints,
    remove_uncommitted,
)
from tropd.pipeline.training.inputs import student_prompts
from tropd.pipeline.training.interrupt import StopRequest, StopRequestedError, stop_on_signal
from tropd.pipeline.training.metrics import MetricsLog, memory_metrics, step_metrics
from tropd.pipeline.training.output import FINAL, export_student
from tropd.pipeline.training.preparation import Preparation, open_preparation, planned_rows
from tropd.pipeline.training.rollouts import Row
from tropd.pipeline.training.samples import resume_samples, write_sample
from tropd.pipeline.training.session import Session, open_session
from tropd.pipeline.training.soundness import check_student, stopped
from tropd.pipeline.training.step import NonFiniteError, StepInputs, backpropagate
from tropd.pipeline.training.student import whole
from tropd.pipeline.training.timeline import FILE_NAME as TRACE
from tropd.pipeline.training.timeline import Timeline
from tropd.pipeline.training.wandb_log import check_wandb, open_wandb, wandb_identity
from tropd.pipeline.training.world import join_world
from tropd.storage.errors import InterruptedStageError
from tropd.storage.fingerprint import Fingerprint
from tropd.storage.manifest import Manifest, check_shard
from tropd.storage.stage import Stage, open_stage
from tropd.storage.step_log import Record, log_problems

STAGE = "train"
_SMALLER = (
    'lower train.micro_batch_tokens, set train.gradient_checkpointing = true or student.dtype = "bfloat16", train '
    "adapters (student.lora), or shard over more GPUs; tropd plan shows what needs the most"
)
SUMMED = (
    "tokens_on_policy",
    "tokens_guidance",
    "teacher_tokens_scored",
    "teacher_topk_tokens",
    "teacher_bytes_sent",
    "teacher_bytes_received",
)


def fingerprint(run: Run, prompts: Encoded) -> Fingerprint:
    """Everything that decides the final weights of a student trained on these prompts."""
    config = run.config
    needs = teacher_needs(config.objective)
    fields = data_fields(run, "prompts") | token_fields(prompts, "data.prompts")
    fields |= model_fields(run, "student") | stop_fields(run, "student") | teacher_fields(run)
    fields |= section_fields("objective", config.objective)
    fields |= section_fields("rollout", config.rollout) | section_fields("train", config.train)
    fields |= engine_fields(run, "student")
    if config.student.lora is not None:
        fields |= section_fields("student.lora", config.student.lora)
    if config.train.dropout:
        # What is dropped depends on how a step is cut up.
        fields |= {"train.dropout": True, "train.micro_batch_tokens": config.train.micro_batch_tokens}
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


def train(run: Run, *, force: bool = False) -> Manifest:
    """Train to the last step, from the newest checkpoint if there is one, and return the finished manifest.

    Raises:
        InterruptedStageError: Ctrl-C or SIGTERM; a checkpoint was written.
        TropdError: a non-finite loss or gradient (the batch is saved), or a teacher that stays away.
    """
    check_wandb(run.config.train.wandb_project)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(pick_device(run.config.runtime.device)))
        if not world.leads:
            run = replace(run, reporter=SILENT)
        if world.leads:
            check_pairs(run)
        # One process writes; the others learn whether there is anything to do, and from where.
        prompts = student_prompts(run) if world.leads else None
        stage = None if prompts is None else stack.enter_context(_open(run, prompts, force))
        manifest = world.tell(None if stage is None else stage.manifest)
        assert manifest is not None
        if manifest.complete:
            if stage is not None:
                check_shard(stage.folder, manifest.shards[FINAL])
                for name, problem in log_problems(stage.folder, manifest):
                    run.reporter.warning(
                        f"train: {stage.folder / name}: {problem}; weights do not depend on it"
                    )
            run.reporter.info(f"train: done before ({manifest.summary['steps']} steps), nothing to do")
            return manifest
        stop = StopRequest()
        # The others read them only now: the first one has fixed the date of their chat template.
        prompts = student_prompts(run) if prompts is None else prompts
        session = open_session(run, stack, world, prompts, run.reporter.warning, stop.sleep)
        # Only now: until the first step there is nothing to save, and Ctrl-C ends at once.
        stack.enter_context(stop_on_signal(stop))
        _run_steps(session, stage, stop)
        return world.tell(None if stage is None else stage.manifest) or manifest


@contextmanager
def _open(run: Run, prompts: Encoded, force: bool) -> Iterator[Stage]:
    folder = run.workspace.stage(STAGE)
    with open_stage(folder, STAGE, fingerprint(run, prompts), force=force, timings=run.timings) as stage:
        own = run.config.objective.importance.clip
        if IMPORTANCE_CLIP in stage.unrecorded and not stage.complete and own is None:
            run.reporter.warning(
                f"{stage.folder} was begun by an older version of tropd, which did not weight responses sampled in "
                "bfloat16: the steps that are still to come are weighted (train.importance_clip)"
            )
        stage.unrecorded = [name for name in stage.unrecorded if name != IMPORTANCE_CLIP]
        tell_unrecorded(run, stage)
        yield stage


def _resume(session: Session, stage: Stage | None) -> tuple[int, dict[str, Any], list[Row] | None]:
    """Restore the newest checkpoint; returns the steps done, the counters, and the next rows if they are known."""
    newest = None
    if stage is not None:
        for aside in remove_uncommitted(stage):
            session.run.reporter.warning(
                f"train: a checkpoint that was never committed is set aside in {aside}"
            )
        newest = newest_checkpoint(stage)
    newest = session.world.tell(newest)
    first, counters = load_checkpoint(newest, session.student.model, session.optimizer)
    rows = load_rows(newest, planned_rows(session, first)) if session.ahead else None
    if stage is not None:
        prune_checkpoints(stage, session.run.config.train.keep_checkpoints)
    if first:
        session.run.reporter.info(f"train: resuming after step {first} of {session.run.config.train.steps}")
    return first, counters, rows


def _run_steps(session: Session, stage: Stage | None, stop: StopRequest) -> None:
    run, config, world = session.run, session.run.config.train, session.world
    first, counters, rows = _resume(session, stage)

    def checkpoint(done: int, inputs: StepInputs) -> None:
        """Save the student after ``done`` steps, the last of which had these inputs."""
        check_student(session, done - 1, inputs)
        if log is not None:
            log.sync()
        with timeline.span("checkpoint", done):
            rows = preparation.rows_ahead(done)
            writer.save(done, session.student.model, session.optimizer, counters, rows)

    with ExitStack() as stack:
        log = None if stage is None else stack.enter_context(MetricsLog(stage.folder, first))
        if stage is not None and log is not None:
            for lost in (log.lost, resume_samples(stage.folder, first, config.steps)):
                if lost:
                    run.reporter.warning(f"train: {lost}")
        writer = stack.enter_context(CheckpointWriter(stage, config.keep_checkpoints, world))
        trace = stage.folder / TRACE if stage is not None and config.trace else None
        timeline = stack.enter_context(Timeline(trace))
        preparation = stack.enter_context(open_preparation(session, timeline, stop))
        if rows is not None:
            preparation.begin(first, rows)
        project = config.wandb_project if stage is not None else None
        identity = wandb_identity(stage.folder) if stage is not None and project is not None else ""
        also_log = stack.enter_context(
            open_wandb(
                project,
                run.workspace.root.name,
                identity,
                to_plain(run.config),
                run.workspace.logs,
            )
        )
        title = f"{run.workspace.root.name} · {run.config.objective.name} · seed {run.config.run.seed}"
        earlier = log.earlier if log is not None else []
        settings = stage.manifest.fields if stage is not None else {}
        with run.reporter.training(title, config.steps, earlier, settings) as shown:
            for step in range(first, config.steps):
                try:
                    record, inputs = _step(session, stage, step, preparation, timeline)
                except StopRequestedError:
                    # The weights are those of the step before: the teacher is asked first. Of several processes only
                    # this one knows; the others end with it, and the last checkpoint stands.
                    if step > first and world.size == 1:
                        checkpoint(step, inputs)
                    raise _interrupted(run, step, "while waiting for the teacher") from None
                for name in SUMMED:
                    counters[name] = counters.get(name, 0) + record[name]
                done = step + 1
                if config.evaluate_every and (done % config.evaluate_every == 0 or done == config.steps):
                    preparation.rows_ahead(done)
                    record |= evaluate_student(session)
                if log is not None:
                    log.write(record)
                    also_log(record)
                shown.step(record)
                writer.check()
                stopping = any(world.gather(bool(stop)))
                if stopping or done % config.checkpoint_every == 0 or done == config.steps:
                    checkpoint(done, inputs)
                if stopping and done < config.steps:
                    raise _interrupted(run, done)
    session.refresh_engine()
    if stage is not None:
        export_student(session, stage)
        stage.finish(steps=config.steps, objective=run.config.objective.name, **counters)


def _interrupted(run: Run, done: int, when: str = "") -> InterruptedStageError:
    return InterruptedStageError(
        f"train: stopped after step {done} of {run.config.train.steps}{when and ', ' + when}"
        + ("; a checkpoint was saved" if done else ""),
        hint=f"{run.command(STAGE)} goes on from there",
    )


def _step(
    session: Session, stage: Stage | None, step: int, preparation: Preparation, timeline: Timeline
) -> tuple[Record, StepInputs]:
    """One optimiser step. Everything random in it is a function of the run's seed and ``step``."""
    config, objective = session.run.config, session.run.config.training_objective
    with timeline.span("total", step):
        prepared = preparation.take(step)
        preparation.begin(step + 1)
        inputs = prepared.inputs
        session.student.model.train()
        session.optimizer.zero_grad(set_to_none=True)
        try:
            with timeline.span("train", step), within_memory("the gradients of a step", _SMALLER):
                outcome = backpropagate(
                    session.passes,
                    session.parameters,
                    objective,
                    inputs,
                    micro_batch_tokens=config.train.micro_batch_tokens,
                    precision=session.precision,
                    region_gradients=config.train.region_gradients,
                    world=session.world,
                )
                norm = float(
                    whole(torch.nn.utils.clip_grad_norm_(session.parameters, config.train.max_grad_norm))
                )
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient's norm is {norm}")
        except NonFiniteError as error:
            logprobs = inputs.teacher.logprobs
            raise stopped(session, step, inputs.rows, logprobs, str(error)) from error
        check_engine(session, step, inputs, outcome)
        if stage is not None:
            tokenizer = session.student.tokenizer
            write_sample(stage.folder, step, config.train.steps, inputs, session.prompts, tokenizer)
        learning_rate = learning_rate_at(config.train, step)
        with timeline.span("optimizer", step), within_memory("the state of the optimizer", _SMALLER):
            for group in session.optimizer.param_groups:
                group["lr"] = learning_rate
            session.optimizer.step()
    record = {
        "step": step,
        **step_metrics(inputs, outcome),
        **prepared.traffic,
        "teacher_retries": prepared.retries,
        "prefix_length_scheduled": prepared.prefix_limit,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        **memory_metrics(session.student.model.device),
        **{f"time_{name}": seconds for name, seconds in timeline.take(step).items()},
    }
    return record, inputs


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of the step with this number (from 0): linear warm-up, then the schedule down to 0."""
    warmup = config.warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate
