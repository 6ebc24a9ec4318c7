"""Extrapolation at the steps 1, 2, 4, 8, …: the search for weights further along the way that the student has gone.

θ ← θ + f·(θ - θ_base), as long as the score on held-out problems rises; the last weights that raised it stay, and become
θ_base. After an accepted attempt f ← f/(1+f), so that the attempts are equal steps along one line: with f = 2 the way
from θ_base becomes 3, 5, 7, 9, 11 times as long. AdamW's moments stay as they are, and so does everything that is not
extrapolated. Source: EffOPD, arXiv 2605.11739, and its code (caiyuchen-ustc/EffOPD).

All of it is a function of θ, θ_base, the run's seed and the problems: a run that was killed repeats it to the same
bits, as long as no grader runs out of time (``evaluation.grading_seconds``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tropd.pipeline.objectives.extrapolation.settings import Extrapolation
from tropd.pipeline.run.interrupt import StopRequestedError
from tropd.pipeline.stages.evaluation.responses import Response, respond
from tropd.pipeline.training.distance.along import reverse_distances, write_held_out
from tropd.pipeline.training.extrapolation.base_weights import BaseWeights
from tropd.pipeline.training.extrapolation.validation import Validation
from tropd.pipeline.training.session import Session
from tropd.storage.formats.step_log import StepRecord


@dataclass(frozen=True)
class Search:
    """The outcome of a search."""

    before: float
    """Score of the weights that the update left."""
    tried: list[float]
    """Scores of the attempts, in order; only the last one may have been rejected."""
    accepted: int
    factor: float
    """The way from θ_base to the weights that stay, in lengths of the way that the update left."""

    @property
    def after(self) -> float:
        """Score of the weights that stay."""
        return self.tried[self.accepted - 1] if self.accepted else self.before


def is_due(done: int) -> bool:
    """Whether weights are extrapolated after so many steps: at powers of two."""
    return done > 0 and done & (done - 1) == 0


def search(base: BaseWeights, settings: Extrapolation, score: Callable[[], float]) -> Search:
    """Extrapolate the student as far as its score rises; then θ_base is the student. A NaN is no rise.

    Args:
        score: of the student as it is; higher is better.
    """
    before = best = score()
    tried: list[float] = []
    copies, accepted, factor, length = base.copies(), 0, settings.factor, 1.0
    while len(tried) < settings.attempts:
        base.stretch(factor)
        tried.append(score())
        if not tried[-1] > best:
            base.restore(copies)
            break
        base.keep(copies)
        best, accepted, length = tried[-1], accepted + 1, length * (1.0 + factor)
        factor /= 1.0 + factor
    base.follow()
    return Search(before, tried, accepted, length)


def extrapolate(session: Session) -> StepRecord:
    """Extrapolate the student after its update; returns metrics. The objective must extrapolate.

    The engine must be idle. Gradients are gone afterwards: copies of the weights take their place.

    Raises:
        StopRequestedError: while the teacher was away; the student then is one of the attempts.
    """
    base, settings = session.base_weights, session.run.config.objective.extrapolation
    validation = session.inputs.validation
    assert base is not None
    assert settings is not None
    assert validation is not None
    session.optimizer.zero_grad(set_to_none=True)
    found = search(base, settings, lambda: _score(session, validation))
    return {
        "extrapolation_score": found.before,
        "extrapolation_score_after": found.after,
        "extrapolation_scores_tried": found.tried,
        "extrapolation_accepted": found.accepted,
        "extrapolation_factor": found.factor,
    }


def _score(session: Session, validation: Validation) -> float:
    """The student's accuracy, or minus the reverse KL per token to its teachers."""
    session.rolling.refresh()
    try:
        if validation.problems:
            return _accuracy(session, validation)
        responses = write_held_out(session, validation.prompts)
        distances = reverse_distances(session, validation.prompts, responses)
        if distances is None:
            raise StopRequestedError
        return -float(np.concatenate([one.kl for one in distances]).mean()) if distances else float("nan")
    finally:
        session.rolling.rest()


def _accuracy(session: Session, validation: Validation) -> float:
    problems, tokenizer = validation.problems, session.student.tokenizer

    def answer(share: list[int]) -> list[Response]:
        own = [problems[i] for i in share]
        return respond(session.run, validation.settings, session.rolling.engine, tokenizer, own, "sampled", 1)

    marks = session.world.spread(range(len(problems)), answer)
    return sum(mark.correct for mark in marks) / len(marks)
