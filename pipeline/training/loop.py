"""Stage 3, ``train``: take a prepared step, update the student; checkpointed, resumed exactly.

A step is prepared first: the student rolls out, the teacher is asked (``rollout.ahead``). Then the loss and its gradient
(``update.gradients``), the optimizer, a line in the journal, and now and then an evaluation and a checkpoint.
Everything random is a function of the run's seed and the step's number, so that an interrupted run ends with the
same weights.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.models.runtime import pick_device
from tropd.pipeline.problems.encoding import tokens_of
from tropd.pipeline.run.interrupt import StopRequest, StopRequestedError, stop_on_signal
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.connect import check_pairs
from tropd.pipeline.training.distance.along import evaluate_student
from tropd.pipeline.training.extrapolation.search import extrapolate, is_due
from tropd.pipeline.training.inputs import student_prompts
from tropd.pipeline.training.memory_plan import PHASES
from tropd.pipeline.training.preflight.preflight import require_room
from tropd.pipeline.training.record.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    load_rows,
    newest_checkpoint,
    prune_checkpoints,
    remove_uncommitted,
    settings_of,
)
from tropd.pipeline.training.record.final_model import export_student
from tropd.pipeline.training.record.journal import Journal, open_journal
from tropd.pipeline.training.record.phase_memory import (
    PhaseMemory,
    memory_metrics,
    of_the_fullest,
    peak_reader,
)
from tropd.pipeline.training.record.step_metrics import step_metrics
from tropd.pipeline.training.record.trace import Timeline
from tropd.pipeline.training.record.wandb_log import check_wandb
from tropd.pipeline.training.rollout.ahead import Preparation, Prepared, open_preparation, planned_rows
from tropd.pipeline.training.rollout.engine_check import check_engine
from tropd.pipeline.training.rollout.rows import Row
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.setup import open_session
from tropd.pipeline.training.train_stage import (
    STAGE,
    check_finished,
    open_train_stage,
    rounding_settings,
    tell_rounding,
)
from tropd.pipeline.training.update.gradients import NonFiniteError, StepInputs, StepOutcome, backpropagate
from tropd.pipeline.training.update.micro_batches import longest_row
from tropd.pipeline.training.update.optimizer import learning_rate_at
from tropd.pipeline.training.update.soundness import check_student, stopped
from tropd.pipeline.training.update.student import whole
from tropd.pipeline.training.world import join_world
from tropd.storage.errors import InterruptedStageError
from tropd.storage.formats.step_log import StepRecord
from tropd.storage.stage.manifest import Manifest
from tropd.storage.stage.stage import Stage

SUMMED = (
    "tokens_on_policy",
    "tokens_guidance",
    "teacher_tokens_scored",
    "teacher_topk_tokens",
    "teacher_bytes_sent",
    "teacher_bytes_received",
)
"""Metrics whose sums over the run are kept in checkpoints and in the manifest."""
_SMALLER = (
    'lower train.micro_batch_tokens, set train.gradient_checkpointing = true or student.dtype = "bfloat16", train '
    "adapters (student.lora), or shard over more GPUs; tropd plan shows what needs the most"
)


@dataclass(frozen=True)
class _Training:
    """A session under way."""

    session: Session
    journal: Journal
    timeline: Timeline
    checkpoints: CheckpointWriter
    preparation: Preparation
    sums: Counter[str]


def train(run: Run, *, force: bool = False) -> Manifest:
    """Train to the last step, from the newest checkpoint if one exists, and return the finished manifest.

    Raises:
        InterruptedStageError: Ctrl-C or SIGTERM; a checkpoint was written.
        TropdError: a non-finite loss or gradient (the batch is saved), or a teacher that stays away.
    """
    check_wandb(run.config.train.wandb_project)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(pick_device(run.config.runtime.device)))
        # One process writes and talks; the others learn from it whether anything is left to do.
        prompts, stage = None, None
        if world.leads:
            check_pairs(run)
            prompts = student_prompts(run)
            stage = stack.enter_context(open_train_stage(run, prompts, force))
        else:
            run = replace(run, reporter=SILENT)
        manifest = world.tell(None if stage is None else stage.manifest)
        assert manifest is not None
        if manifest.complete:
            if stage is not None:
                check_finished(run, stage)
            run.reporter.info(f"train: done before ({manifest.summary['steps']} steps), nothing to do")
            return manifest
        # The others read them only now: the first one has fixed the date of their chat template.
        prompts = student_prompts(run) if prompts is None else prompts
        if world.leads:
            require_room(run, world.size, max(map(len, tokens_of(prompts.prompts)), default=0))
        stop = StopRequest()
        session = open_session(run, stack, world, prompts, run.reporter.warning, stop.sleep)
        # Only now: until the first step nothing needs saving, and Ctrl-C ends at once.
        word = "train: stopping after this step, with a checkpoint; once more stops at once, without"
        stack.enter_context(stop_on_signal(stop, word if world.leads else ""))
        sums = _train_steps(session, stage, stop)
        session.rolling.gather()
        if stage is not None:
            export_student(session, stage)
            stage.finish(steps=run.config.train.steps, objective=run.config.objective.name, **sums)
        return world.tell(None if stage is None else stage.manifest) or manifest


def _train_steps(session: Session, stage: Stage | None, stop: StopRequest) -> Counter[str]:
    """Every step that is still to come; returns the sums over the whole run."""
    run, config, world = session.run, session.run.config.train, session.world
    first, sums, rows = _resume(session, stage)
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(session, stage, first))
        collects = config.trace and not world.leads
        # Phases that overlap have no peaks of their own.
        memory = PhaseMemory(peak_reader(session.student.model.device), () if session.ahead else PHASES)
        timeline = stack.enter_context(
            Timeline(journal.trace, rank=world.rank, collects=collects, memory=memory)
        )
        checkpoints = stack.enter_context(CheckpointWriter(stage, config.keep_checkpoints, world))
        preparation = stack.enter_context(open_preparation(session, timeline, stop))
        training = _Training(session, journal, timeline, checkpoints, preparation, sums)
        if rows is not None:
            preparation.begin(first, rows)
        peak = session.training_peak()
        inputs = None
        for step in range(first, config.steps):
            try:
                with timeline.span("total", step):
                    prepared = preparation.take(step)
                    preparation.begin(step + 1)
                    inputs, record = prepared.inputs, _update(training, step, prepared)
            except StopRequestedError:
                # The weights are those of the step before: the teacher is asked first. Of several processes only
                # this one knows; the others end with it, and the last checkpoint stands.
                if inputs is not None and world.size == 1:
                    _save(training, step, inputs)
                raise _interrupted(run, step, "while waiting for the teacher") from None
            record |= {f"time_{name}": seconds for name, seconds in timeline.take(step).items()}
            taken = memory_metrics(session.student.model.device, memory)
            told = world.gather((world.take_waits(), timeline.take_events(), taken, record.get("time_ask")))
            record |= of_the_fullest([taken for _, _, taken, _ in told])
            if asked := [seconds for *_, seconds in told if seconds is not None]:
                record["time_ask"] = math.fsum(asked)
            if peak is not None:
                lengths = [len(row.sequence) for row in inputs.rows]
                record["mfu_train"] = peak.mfu(lengths, record["time_train"])
            if world.size > 1:
                record["exchange_seconds"] = [seconds for seconds, *_ in told]
                for _, events, *_ in told:
                    timeline.add(events)
            sums.update({name: record[name] for name in SUMMED})
            done = step + 1
            if config.evaluate_every and (done % config.evaluate_every == 0 or done == config.steps):
                preparation.rows_ahead(done)  # after this the engine is idle
                record |= evaluate_student(session)
            journal.write(record)
            checkpoints.check()
            stopping = any(world.gather(bool(stop)))
            if stopping or done % config.checkpoint_every == 0 or done == config.steps:
                _save(training, done, inputs)
            if stopping and done < config.steps:
                raise _interrupted(run, done)
    return sums


def _update(training: _Training, step: int, prepared: Prepared) -> StepRecord:
    """Update the student with a prepared step; returns the step's metrics."""
    session, inputs = training.session, prepared.inputs
    config = session.run.config.train
    try:
        with training.timeline.span("train", step), within_memory("the gradients of a step", _SMALLER):
            outcome, norm = _gradient(session, inputs)
    except NonFiniteError as error:
        raise stopped(session, step, inputs.rows, inputs.teacher.teacher_logprobs, str(error)) from error
    check_engine(session, step, inputs, outcome)
    training.journal.sample(step, inputs)
    learning_rate = learning_rate_at(config, step)
    with (
        training.timeline.span("optimizer", step),
        within_memory("the state of the optimizer", _SMALLER),
    ):
        for group in session.optimizer.param_groups:
            group["lr"] = learning_rate
        session.optimizer.step()
    extrapolated = _extrapolate(training, step + 1)
    if session.following is not None:
        session.following.follow(session.student.model, step + 1)
    return {
        "step": step,
        **step_metrics(inputs, outcome),
        **prepared.traffic,
        "teacher_retries": prepared.retries,
        "prefix_length_scheduled": prepared.prefix_limit,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        **extrapolated,
    }


def _extrapolate(training: _Training, done: int) -> StepRecord:
    """Extrapolate the weights after ``done`` steps, where that is due; returns metrics of it.

    Raises:
        InterruptedStageError: a stop was requested while it waited for the teacher. The weights of now are no step's.
    """
    session = training.session
    if session.base_weights is None or not is_due(done):
        return {}
    try:
        with training.timeline.span("extrapolate", done - 1):
            return extrapolate(session)
    except StopRequestedError:
        run = session.run
        raise InterruptedStageError(
            f"train: stopped in step {done} of {run.config.train.steps}, while waiting for the teacher's judgment of "
            "extrapolated weights; the last checkpoint stands",
            hint=f"run {run.command(STAGE)} to resume",
        ) from None


def _gradient(session: Session, inputs: StepInputs) -> tuple[StepOutcome, float]:
    """The step's gradient in the parameters, clipped, and its norm before that.

    Raises:
        NonFiniteError: a loss or the norm is NaN or infinite.
    """
    config = session.run.config.train
    session.student.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    outcome = backpropagate(
        session.passes,
        session.parameters,
        session.run.config.training_objective,
        inputs,
        micro_batch_tokens=config.micro_batch(longest_row(inputs.rows)),
        region_gradients=config.region_gradients,
        world=session.world,
    )
    norm = float(whole(torch.nn.utils.clip_grad_norm_(session.parameters, config.max_grad_norm)))
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient's norm is {norm}")
    return outcome, norm


def _save(training: _Training, done: int, inputs: StepInputs) -> None:
    """Save the student after ``done`` steps, the last of which had these inputs."""
    session = training.session
    check_student(session, done - 1, inputs)
    training.journal.sync()
    with training.timeline.span("checkpoint", done):
        rows = training.preparation.rows_ahead(done)
        model, changing = session.student.model, session.changing
        settings = rounding_settings(session.run)
        training.checkpoints.save(done, model, session.optimizer, training.sums, rows, changing, settings)


def _resume(session: Session, stage: Stage | None) -> tuple[int, Counter[str], list[Row] | None]:
    """Restore the newest checkpoint; returns the steps done, the sums, and the next rows if they are known."""
    newest = None
    if stage is not None:
        for aside in remove_uncommitted(stage):
            session.run.reporter.warning(
                f"train: a checkpoint that was never committed is set aside in {aside}"
            )
        newest = newest_checkpoint(stage)
    newest = session.world.tell(newest)
    first, sums = load_checkpoint(newest, session.student.model, session.optimizer, session.changing)
    rows = load_rows(newest, planned_rows(session, first)) if session.ahead else None
    if stage is not None:
        prune_checkpoints(stage, session.run.config.train.keep_checkpoints)
    if first:
        session.run.reporter.info(f"train: resuming after step {first} of {session.run.config.train.steps}")
        tell_rounding(session.run, settings_of(newest))
    return first, Counter(sums), rows


def _interrupted(run: Run, done: int, when: str = "") -> InterruptedStageError:
    return InterruptedStageError(
        f"train: stopped after step {done} of {run.config.train.steps}{when and ', ' + when}"
        + ("; a checkpoint was saved" if done else ""),
        hint=f"run {run.command(STAGE)} to resume",
    )
