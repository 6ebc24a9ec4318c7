"""The check that a separate rollout engine has the weights that are trained."""

from __future__ import annotations

import numpy as np

from tropd.pipeline.training.session import Session
from tropd.pipeline.training.update.gradients import StepInputs, StepOutcome
from tropd.storage.errors import TropdError

CHECKED_ROWS = 8


def check_engine(session: Session, step: int, inputs: StepInputs, outcome: StepOutcome) -> None:
    """Another engine that rolls out must have the weights that are trained; old ones show in its log-probs.

    Raises:
        TropdError: its log-probs of the rollouts and the trainer's differ by more than ``vllm.max_mean_difference``.
    """
    config = session.run.config.vllm
    if session.rolling.checked is None or not (step == 1 or step % config.check_every == 0):
        return
    if session.ahead:
        if step == session.run.config.train.steps - 1:
            return  # no step comes after this, so the engine was not given its weights
        # The rollouts are those of older weights; by now the engine has those that this step was computed with.
        rows = [row for row in inputs.rows if row.tokens][:CHECKED_ROWS]
        scores = session.rolling.checked.token_logprobs(
            [row.sequence for row in rows], [len(row.context) for row in rows]
        )
        engine = np.concatenate([np.zeros(0), *scores])
    else:
        engine = inputs.sampler_logprobs
    difference = np.abs(outcome.student_logprobs[: len(engine)] - engine)
    if len(difference) and float(difference.mean()) > config.max_mean_difference:
        raise TropdError(
            f"step {step}: vLLM's log-probs of its rollouts differ from the trainer's by {difference.mean():.3g} nats "
            f"on average and {difference.max():.3g} at most; the limit is {config.max_mean_difference}",
            hint="its weights may be old or of lower precision: check vllm.quantization and student.dtype, raise "
            'vllm.max_mean_difference if the difference is expected, or set student.engine = "transformers"',
        )
