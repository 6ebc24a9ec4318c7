"""Verdicts on a run, from the report's data alone, as a careful colleague would give them. A healthy run has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tropd.pipeline.report.data.facts import (
    Accuracy,
    Answers,
    Cache,
    Evaluation,
    Example,
    Measure,
    Training,
    Verdict,
)
from tropd.pipeline.report.page.formats import percent, points
from tropd.pipeline.report.verdicts.headline import movement
from tropd.pipeline.report.verdicts.training_verdicts import training_verdicts, verdict
from tropd.pipeline.report.verdicts.verdict_rules import LIMITS
from tropd.storage.workspace import EVALUATED, Mode, Who

MODES: tuple[Mode, ...] = ("greedy", "sampled")
_NAMES: Mapping[Who, str] = {
    "before": "the student before training",
    "after": "the trained student",
    "teacher": "the teacher",
}


def find_verdicts(
    evaluation: Evaluation, training: Training | None, cache: Cache, settings: Mapping[str, Any]
) -> list[Verdict]:
    """All verdicts, problems first, each name once.

    Args:
        settings: values by dotted path, as the stages ran with them.
    """
    found = [
        *_closeness(evaluation),
        *_grading(evaluation, settings),
        *_outcome(evaluation),
        *(training_verdicts(training.series, settings) if training else ()),
        *_cache(cache, settings),
    ]
    once: dict[str, Verdict] = {}
    for one in found:
        once.setdefault(one.name, one)
    return sorted(once.values(), key=lambda one: one.level != "problem")


def _closeness(evaluation: Evaluation) -> list[Verdict]:
    """Verdicts on the purpose of training: the student's distance to the teacher."""
    before, after = evaluation.distance("before"), evaluation.distance("after")
    start, end = (one.reverse_kl if one else None for one in (before, after))
    if not (before and after and start and end) or start.mean <= LIMITS.same:
        return []
    if end.mean <= (1 - LIMITS.closer) * start.mean:
        return []
    evidence = [
        f"{name}: {_measured(first)} before, {_measured(last)} after training"
        for name, first, last in (
            ("reverse KL", start, end),
            ("forward KL", before.forward_kl, after.forward_kl),
            ("acceptance", before.acceptance, after.acceptance),
        )
        if first and last
    ]
    kls = f"reverse KL {start.mean:.3g} nats per token before training, {end.mean:.3g} after"
    return [verdict("not-closer", f"{movement(start, end, evaluation.reverse_kl_change)}: {kls}.", *evidence)]


def _measured(measure: Measure) -> str:
    ends = measure.interval
    return f"{measure.mean:.3g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else "")


def _grading(evaluation: Evaluation, settings: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts on whether accuracy can be believed at all."""
    mode = next((mode for mode in MODES if evaluation.accuracy("teacher", mode)), MODES[0])
    teacher, before = evaluation.accuracy("teacher", mode), evaluation.accuracy("before", mode)
    answers = {who: one.answers for who in EVALUATED if (one := _either(evaluation, who)) and one.answers}
    judges: dict[Who, Answers] = {"teacher": answers["teacher"]} if "teacher" in answers else answers
    if judges.keys() & {"teacher", "before"} and all(
        (found.unanswered or 0.0) >= LIMITS.unanswered for found in judges.values()
    ):
        return [_misfit(judges, settings)]
    found: list[Verdict] = []
    cut = _cut(evaluation, "teacher") >= LIMITS.teacher_cut
    if teacher and not cut and teacher.problems >= LIMITS.fewest_problems:
        if teacher.accuracy <= LIMITS.right:
            sentence = (
                f"The teacher has {percent(teacher.accuracy)} of {teacher.problems} problems right ({mode})."
            )
            found.append(verdict("teacher-wrong", sentence, *_examples(teacher.answers)))
        elif before and before.low > teacher.high and before.accuracy - teacher.accuracy >= LIMITS.behind:
            found.append(
                verdict(
                    "teacher-behind",
                    f"The teacher has {percent(teacher.accuracy)} right, the student has {percent(before.accuracy)} "
                    f"before training ({mode}).",
                    f"95 % intervals: teacher {_interval(teacher)}, student {_interval(before)}",
                )
            )
    return found


def _misfit(judges: Mapping[Who, Answers], settings: Mapping[str, Any]) -> Verdict:
    """The grader finds no answer in the responses of all of these."""
    subject = " and ".join(_NAMES[who] for who in judges)
    most = min(answers.unanswered or 0.0 for answers in judges.values())
    grader = settings.get("evaluation.grader")
    finder = f"The grader {grader!r}" if grader else "The grader"
    share = "any response" if most == 1 else f"{percent(most)} of the responses"
    return verdict(
        "grader-misfit",
        f"{finder} finds no answer in {share} of {subject}: it probably does not fit, and accuracy says nothing.",
        *_examples(next(iter(judges.values()))),
    )


def _outcome(evaluation: Evaluation) -> list[Verdict]:
    """Verdicts on the student after training."""
    found: list[Verdict] = []
    after, teacher = _either(evaluation, "after"), _either(evaluation, "teacher")
    teacher_cut, student_cut = _cut(evaluation, "teacher"), _cut(evaluation, "after")
    if teacher_cut >= LIMITS.teacher_cut:
        sentence = f"{percent(teacher_cut)} of the teacher's responses are cut off at the length limit."
        found.append(verdict("short-limit", sentence, *_lengths(evaluation)))
    elif student_cut >= LIMITS.cut:
        sentence = f"The student does not stop: {percent(student_cut)} of its responses are cut off at the length limit."
        found.append(verdict("never-stops", sentence, *_lengths(evaluation)))
    unanswered, of_teacher = (
        who.answers.unanswered if who and who.answers else None for who in (after, teacher)
    )
    if unanswered is not None and unanswered >= LIMITS.unanswered and (of_teacher or 0.0) < LIMITS.unanswered:
        beside = "" if of_teacher is None else f"; of the teacher's, {percent(of_teacher)} have none"
        sentence = f"{percent(unanswered)} of the trained student's responses have no answer{beside}."
        found.append(verdict("no-answers", sentence, *_examples(after.answers if after else None)))
    if (constant := _constant(evaluation)) is not None:
        found.append(constant)
    for mode in MODES:
        gain = getattr(evaluation.gain, mode)
        if gain and gain.high < 0 and gain.difference <= -LIMITS.fell:
            interval = f"{points(gain.low)} to {points(gain.high)}"
            sentence = f"Accuracy ({mode}) fell by {points(-gain.difference).lstrip('+')} points."
            evidence = (
                f"{gain.became_wrong} of {gain.problems} problems got worse, {gain.became_right} better"
            )
            found.append(verdict("accuracy-fell", sentence, f"95 % interval {interval} points", evidence))
    return found


def _constant(evaluation: Evaluation) -> Verdict | None:
    for mode in MODES:
        accuracy = evaluation.accuracy("after", mode)
        answers = accuracy.answers if accuracy else None
        if not accuracy or not answers or accuracy.problems < LIMITS.fewest_problems:
            continue
        most, expected = answers.commonest_fraction, answers.expected_fraction
        if most >= LIMITS.constant and most >= expected + LIMITS.above_expected:
            return verdict(
                "constant-answer",
                f"The student answers nearly everything alike: {percent(most)} of its answers are “{answers.commonest}”.",
                f"{mode}: the commonest expected answer is that of {percent(expected)}",
                *_examples(answers),
            )
    return None


def _cache(cache: Cache, settings: Mapping[str, Any]) -> list[Verdict]:
    if cache.kept_mass is None or cache.kept_mass >= LIMITS.kept_mass:
        return []
    k = settings.get("scores.k")
    sentence = f"The teacher cache keeps {percent(cache.kept_mass)} of the teacher's probability" + (
        f", with scores.k = {k}." if k else "."
    )
    each = cache.alternatives_per_token
    evidence = [] if each is None else [f"{each:.1f} alternatives per token on average"]
    return [verdict("kept-mass", sentence, *evidence)]


def _either(evaluation: Evaluation, who: Who) -> Accuracy | None:
    """Greedy answers are the same on every machine; sampled ones where there are no others."""
    return next((found for mode in MODES if (found := evaluation.accuracy(who, mode))), None)


def _cut(evaluation: Evaluation, who: Who) -> float:
    """Share of a model's responses that are cut off, graded or not; 0 where it has none."""
    graded, distance = _either(evaluation, who), evaluation.distance(who)
    if graded and graded.truncated_fraction is not None:
        return graded.truncated_fraction
    return distance.truncated.mean if distance and distance.truncated else 0.0


def _interval(accuracy: Accuracy) -> str:
    return f"{percent(accuracy.low)} to {percent(accuracy.high)}"


def _lengths(evaluation: Evaluation) -> list[str]:
    lines = []
    for who in EVALUATED:
        found = _either(evaluation, who)
        if found and found.truncated_fraction is not None and found.mean_tokens is not None:
            cut = percent(found.truncated_fraction)
            lines.append(f"{_NAMES[who]}: {cut} cut off, {found.mean_tokens:.1f} tokens on average")
    return lines


def _examples(answers: Answers | None) -> Sequence[str]:
    return [_example(one) for one in answers.examples] if answers else []


def _example(one: Example) -> str:
    asked = f"“{one.prompt}” → " if one.prompt is not None else ""
    taken = "no answer found" if one.answer is None else f"answer “{one.answer}”"
    return f"{asked}“{one.response}”: {taken}, expected “{one.expected}”"
