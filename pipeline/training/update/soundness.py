"""Checks that the student is still a language model, before the teacher is asked and before anything is saved.

A step that is far too large leaves weights whose log-probs are NaN, or nowhere near the student's of before. That is
nobody's fault but the step's: it is said as such, with the batch, and the last checkpoint stays the last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from tropd.pipeline.models.output.logprobs import Lookups
from tropd.pipeline.models.runtime import autocast
from tropd.pipeline.objectives.estimators import LOGPROB_FLOOR
from tropd.pipeline.training.rollout.rows import Row, sampler_logprobs
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.update.gradients import StepInputs
from tropd.pipeline.training.update.micro_batches import Layout, longest_row, micro_batches
from tropd.pipeline.training.update.student import whole
from tropd.storage.bounds import are_logprobs
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import TropdError

MOST_WEIGHT = 1e6
"""Largest absolute weight of a language model, with room: those that were ever in float16 stay below 65,504."""
UNBOUNDED = "its update left weights that are not finite"


def check_rollouts(session: Session, step: int, rows: Sequence[Row]) -> None:
    """Check that the student's log-probs of its new tokens are log-probs.

    Raises:
        TropdError: one is NaN, infinite or positive.
    """
    logprobs = sampler_logprobs(rows)
    if not (np.isfinite(logprobs).all() and are_logprobs(logprobs)):
        raise stopped(session, step, rows, (), "the student's log-probs of its own tokens are not finite")


def check_student(session: Session, step: int, inputs: StepInputs) -> None:
    """Check after a step's update: the weights are finite and of a sane size, and so are the log-probs of its tokens.

    A pass over some of the step's rows, without gradient. Every process takes part, with the same rows.

    Raises:
        TropdError: they do not. Nothing was saved since.
    """
    parameters = session.parameters
    with torch.no_grad():
        largest = float(whole(torch.nn.utils.get_total_norm(parameters, norm_type=float("inf"))))
    logprobs = inputs.teacher.teacher_logprobs
    if not largest <= MOST_WEIGHT:
        problem = f"its update left weights of up to {largest:.3g}" if np.isfinite(largest) else UNBOUNDED
        raise stopped(session, step, inputs.rows, logprobs, problem)
    mean = _mean_logprob(session, inputs, parameters[0].device)
    if not mean >= LOGPROB_FLOOR:
        problem = f"after its update the student gives its responses a mean log-prob of {mean:.3g} per token"
        raise stopped(session, step, inputs.rows, logprobs, problem)


def _mean_logprob(session: Session, inputs: StepInputs, device: torch.device) -> float:
    """Mean log-prob of the response tokens of a first micro-batch."""
    budget = session.run.config.train.micro_batch(longest_row(inputs.rows))
    layout = Layout(inputs.rows, guided=True)
    batch = next(iter(micro_batches(layout, budget, device, packing=session.passes.packing)))
    with torch.no_grad(), _uncompiled(session), autocast(device, session.precision):
        logprobs, *_ = session.passes(batch, Lookups.none(batch.targets))
    return float(logprobs.mean()) if len(logprobs) else 0.0


def _uncompiled(session: Session) -> AbstractContextManager[Any]:
    """This kind of pass is too rare to be compiled for."""
    if not session.student.compiles:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def stopped(
    session: Session, step: int, rows: Sequence[Row], teacher_logprobs: Sequence[float] | Any, problem: str
) -> TropdError:
    """Save the batch of a step that cannot count, and say where it is. The last checkpoint stays as it is."""
    if not session.world.leads:
        return TropdError(f"step {step}: {problem}")
    path = session.run.workspace.stage("train") / f"non-finite-step-{step:06d}.json"
    content: dict[str, Any] = {
        "step": step,
        "reason": problem,
        "rows": [asdict(row) for row in rows],
        "teacher_logprobs": [float(value) for value in teacher_logprobs],
    }
    write_text_atomic(path, json.dumps(content))
    rate = session.run.config.train.learning_rate
    return TropdError(
        f"step {step}: {problem}. The step's batch is in {path}; the weights of the last checkpoint are untouched",
        hint=f"look at the batch; a lower train.learning_rate (now {rate:g}) or teacher.dtype = 'float32' often helps",
    )
