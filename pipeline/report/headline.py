"""The first sentence of a report: what came of the run."""

from __future__ import annotations

from tropd.pipeline.report.formats import percent
from tropd.pipeline.report.schema import Evaluation
from tropd.pipeline.status import EVALUATED


def headline(evaluation: Evaluation) -> str:
    """The outcome in one sentence, in sampled answers where there are any."""
    for mode in ("sampled", "greedy"):
        before, after, teacher = (evaluation.accuracy(who, mode) for who in EVALUATED)  # type: ignore[arg-type]
        beside = f"; the teacher has {percent(teacher.accuracy)}" if teacher else ""
        if before and after:
            start, end = percent(before.accuracy), percent(after.accuracy)
            if start == end:
                return f"The student stayed at {end} of {mode} answers right{beside}."
            verb = "fell" if after.accuracy < before.accuracy else "went"
            return f"The student {verb} from {start} to {end} of {mode} answers right{beside}."
        if after:
            return f"The trained student has {percent(after.accuracy)} of {mode} answers right{beside}."
        if before:
            return (
                f"Before training the student has {percent(before.accuracy)} of {mode} answers right{beside}."
            )
        if teacher:
            return f"The teacher has {percent(teacher.accuracy)} of {mode} answers right."
    return "This run has not been evaluated yet."
