"""The first sentence of a report: the student's change of distance to the teacher, and its accuracy."""

from __future__ import annotations

import math

from tropd.pipeline.report.data.facts import Distance, Evaluation, Measure
from tropd.pipeline.report.page.formats import percent
from tropd.pipeline.report.verdicts.verdict_rules import LIMITS
from tropd.storage.workspace import EVALUATED


def headline(evaluation: Evaluation) -> str:
    """The outcome in one sentence: distances where both are known, and accuracy, in sampled answers if there are any."""
    before, after = evaluation.distance("before"), evaluation.distance("after")
    if before and after and before.reverse_kl and after.reverse_kl:
        moved = movement(before.reverse_kl, after.reverse_kl, evaluation.reverse_kl_change)
        return f"{moved}: {_distances(before, after)}{_beside(evaluation)}."
    return _accuracy(evaluation)


def movement(before: Measure, after: Measure, change: Measure | None) -> str:
    """The move of the reverse KL in words, as sure as the interval of its change by pairs, or those of both, allow."""
    if max(before.mean, after.mean) < LIMITS.same:
        return "The student is where the teacher is"
    if change is None:
        nearer = farther = not _overlap(before, after)
    else:
        low, high = change.interval or (-math.inf, math.inf)
        nearer, farther = high < 0.0, low > 0.0
    if after.mean <= (1 - LIMITS.closer) * before.mean:
        return f"The student {'came' if nearer else 'may have come'} closer to the teacher"
    if after.mean >= (1 + LIMITS.closer) * before.mean:
        return f"The student {'' if farther else 'may have '}moved away from the teacher"
    return "The student did not come closer to the teacher"


def _overlap(before: Measure, after: Measure) -> bool:
    """True if the intervals of both do not rule out that nothing moved; unknown ones do not either."""
    if before.interval is None or after.interval is None:
        return True
    return before.interval[0] <= after.interval[1] and after.interval[0] <= before.interval[1]


def _distances(before: Distance, after: Distance) -> str:
    parts = [
        f"{name} {_nats(start.mean)} → {_nats(end.mean)}"
        for name, start, end in (
            ("reverse KL", before.reverse_kl, after.reverse_kl),
            ("forward KL", before.forward_kl, after.forward_kl),
        )
        if start and end
    ]
    return f"{', '.join(parts)} nats per token"


def _nats(value: float) -> str:
    """At least two significant digits, also of small values."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _beside(evaluation: Evaluation) -> str:
    """Accuracy, as the part after the distances."""
    for mode in ("sampled", "greedy"):
        before, after, teacher = (evaluation.accuracy(who, mode) for who in EVALUATED)
        if before and after:
            beside = f" (teacher {percent(teacher.accuracy)})" if teacher else ""
            return f"; {mode} answers right {percent(before.accuracy)} → {percent(after.accuracy)}{beside}"
    return ""


def _accuracy(evaluation: Evaluation) -> str:
    for mode in ("sampled", "greedy"):
        before, after, teacher = (evaluation.accuracy(who, mode) for who in EVALUATED)
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
