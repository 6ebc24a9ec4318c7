"""Accuracies with intervals, and responses side by side, from the evaluation's Parquet files."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tropd.pipeline.report.data.facts import (
    Accuracy,
    Answers,
    BeforeAndAfter,
    Contender,
    Distance,
    Evaluation,
    Example,
    Gain,
    Gains,
    GradedAnswer,
    Measure,
)
from tropd.pipeline.stages.evaluation.statistics import accuracy_interval, paired_interval, token_mean_change
from tropd.storage.errors import TropdError
from tropd.storage.stage.manifest import check_shard, read_manifest
from tropd.storage.workspace import EVALUATED, Mode, Who

MODES: tuple[Mode, ...] = ("sampled", "greedy")
_COLUMNS = ["mode", "prompt_id", "correct", "num_tokens", "finish_reason", "answer", "expected"]
_NEEDED = {"mode", "prompt_id", "correct"}
# Kinds of problem to show, and how many of each: also those that training made worse.
_SHOWN = (((False, True), 3), ((True, False), 2), ((True, True), 1), ((False, False), 1))
MAX_SHOWN_CHARACTERS = 4000
_EXAMPLES, _EXAMPLE_CHARACTERS = 3, 200


@dataclass
class _Graded:
    """The graded responses of one model in one mode."""

    correct: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    answers: Counter[str | None] = field(default_factory=Counter)
    expected: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    """Responses that were not cut off; of these"""
    unanswered: int = 0
    """have no answer, as the first responses to these problems."""
    without: list[str] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        return {problem: float(np.mean(right)) for problem, right in self.correct.items()}


class EvaluationFiles:
    """The evaluation's files that can be trusted. ``problems`` names the faults of the others."""

    def __init__(self, folder: Path) -> None:
        self.problems: list[str] = []
        self.paths: dict[str, Path] = {}
        self.distances: dict[str, Path] = {}
        try:
            manifest = read_manifest(folder)
        except (TropdError, OSError) as error:
            # The answers themselves may be whole: better shown with a warning than hidden.
            found = {w: folder / f"part-{w}.parquet" for w in EVALUATED}
            self.paths = {who: path for who, path in found.items() if path.is_file()}
            shown = "; its files are shown unchecked" if self.paths else ""
            self.problems.append(f"eval: {str(error).splitlines()[0].replace(f'{folder}/', '')}{shown}")
            return
        for name, shard in sorted(manifest.shards.items()) if manifest else []:
            try:
                check_shard(folder, shard)
            except (TropdError, OSError) as error:
                self.problems.append(f"eval: {str(error).splitlines()[0].replace(f'{folder}/', '')}")
                continue
            kind, _, who = name.removesuffix(".parquet").partition("-")
            if name.endswith(".parquet") and kind in ("part", "distance"):
                (self.paths if kind == "part" else self.distances)[who] = folder / name

    def read(self, who: str, columns: list[str], **filters: Any) -> list[dict[str, Any]]:
        """Rows of one model; an unreadable file is a problem and has no rows."""
        if who not in self.paths:
            return []
        path = self.paths[who]
        try:
            available = set(pq.read_schema(path).names)
            if lacking := _NEEDED - available:
                self.problems.append(f"eval: {path.name} has no column {', '.join(sorted(lacking))}")
                return []
            table = pq.read_table(path, columns=[c for c in columns if c in available], **filters)
        except (pa.ArrowException, OSError) as error:
            self.problems.append(f"eval: {path.name} is not readable ({str(error).splitlines()[0]})")
            return []
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def summarize_evaluation(
    files: EvaluationFiles, prompts: Mapping[str, str], distances: Mapping[str, Distance]
) -> Evaluation:
    """Accuracy of every model in every mode with responses, and their distances."""
    graded = {who: _grade(files, who) for who in EVALUATED}
    contenders = {
        who: Contender(
            **{mode: _accuracy(one, _answers(files, who, mode, one, prompts)) for mode, one in modes.items()},
            distance=distances.get(who),
        )
        for who, modes in graded.items()
        if modes or who in distances
    }
    gains = {
        mode: _gain(graded["before"][mode].means, graded["after"][mode].means)
        for mode in MODES
        if mode in graded["before"] and mode in graded["after"]
    }
    return Evaluation(
        before=contenders.get("before"),
        after=contenders.get("after"),
        teacher=contenders.get("teacher"),
        gain=Gains(**gains),
        reverse_kl_change=_reverse_kl_change(files),
    )


def _reverse_kl_change(files: EvaluationFiles) -> Measure | None:
    """Over the prompts of both students; None where they are not measured, or a file is not readable."""
    if not {"before", "after"} <= files.distances.keys():
        return None
    columns = ["prompt_id", "reverse_kl", "student_tokens"]
    try:
        before, after = (
            {
                row["prompt_id"]: row
                for row in pq.read_table(files.distances[who], columns=columns).to_pylist()
            }
            for who in ("before", "after")
        )
    except (pa.ArrowException, OSError) as error:
        files.problems.append(f"eval: distances are not readable ({str(error).splitlines()[0]})")
        return None
    known = [
        (one, after[name])
        for name, one in before.items()
        if name in after and None not in (one["reverse_kl"], after[name]["reverse_kl"])
    ]
    if not known:
        return None
    sums = [[row["reverse_kl"] * row["student_tokens"] for row in rows] for rows in zip(*known, strict=True)]
    tokens = [[row["student_tokens"] for row in rows] for rows in zip(*known, strict=True)]
    found = token_mean_change((sums[0], tokens[0]), (sums[1], tokens[1]))
    return Measure(mean=found.value, interval=None if math.isnan(found.low) else (found.low, found.high))


def _grade(files: EvaluationFiles, who: str) -> dict[Mode, _Graded]:
    modes: dict[Mode, _Graded] = {}
    ungraded = 0
    for row in files.read(who, _COLUMNS):
        if row["mode"] not in MODES or row["correct"] is None:
            ungraded += 1
            continue
        one = modes.setdefault(row["mode"], _Graded())
        problem = str(row["prompt_id"])
        if row.get("finish_reason") != "length":
            one.whole += 1
            one.unanswered += row.get("answer") is None
            if row.get("answer") is None and problem not in one.correct:
                one.without.append(problem)
        one.correct[problem].append(bool(row["correct"]))
        if row.get("num_tokens") is not None:
            one.tokens.append(int(row["num_tokens"]))
        if row.get("finish_reason") is not None:
            one.truncated.append(row["finish_reason"] == "length")
        if row.get("expected") is not None:
            one.answers[row.get("answer")] += 1
            one.expected[str(row["expected"])] += 1
    if ungraded:
        files.problems.append(f"eval: {ungraded} response(s) of {who} have no grade and are left out")
    return modes


def _answers(
    files: EvaluationFiles, who: str, mode: Mode, graded: _Graded, prompts: Mapping[str, str]
) -> Answers | None:
    """Answers found in the responses, with examples of responses without one."""
    total = graded.answers.total()
    if not total:
        return None
    found = Counter({answer: count for answer, count in graded.answers.items() if answer is not None})
    commonest, count = found.most_common(1)[0] if found else (None, 0)
    wrong = [problem for problem, marks in graded.correct.items() if not marks[0]]
    chosen = list(dict.fromkeys(graded.without or wrong))[:_EXAMPLES]
    return Answers(
        unanswered=graded.unanswered / graded.whole if graded.whole else None,
        commonest=None if commonest is None else shorten(str(commonest), _EXAMPLE_CHARACTERS),
        commonest_fraction=count / total,
        expected_fraction=graded.expected.most_common(1)[0][1] / total,
        examples=[
            Example(
                prompt=shorten(prompts[problem], _EXAMPLE_CHARACTERS) if problem in prompts else None,
                response=shorten(str(row.get("response") or ""), _EXAMPLE_CHARACTERS),
                answer=None
                if row.get("answer") is None
                else shorten(str(row["answer"]), _EXAMPLE_CHARACTERS),
                expected=shorten(str(row.get("expected") or ""), _EXAMPLE_CHARACTERS),
            )
            for problem, row in _responses(files, who, mode, chosen).items()
        ],
    )


def _accuracy(graded: _Graded, answers: Answers | None) -> Accuracy:
    means = np.array(list(graded.means.values()))
    samples = sum(len(right) for right in graded.correct.values())
    low, high = accuracy_interval(means, samples)
    return Accuracy(
        accuracy=float(np.mean(means)),
        low=low,
        high=high,
        problems=len(means),
        samples=samples,
        mean_tokens=float(np.mean(graded.tokens)) if graded.tokens else None,
        truncated_fraction=float(np.mean(graded.truncated)) if graded.truncated else None,
        answers=answers,
    )


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> Gain | None:
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    differences = np.array([after[problem] - before[problem] for problem in shared])
    low, high = paired_interval(differences)
    return Gain(
        difference=float(np.mean(differences)),
        low=low,
        high=high,
        problems=len(shared),
        became_right=int(np.sum(differences > 0)),
        became_wrong=int(np.sum(differences < 0)),
    )


def pick_samples(files: EvaluationFiles, prompts: Mapping[str, str]) -> list[BeforeAndAfter]:
    """A few responses to the same problems before and after training, some of every outcome there is."""
    for mode in MODES:
        before, after = _first_grades(files, "before", mode), _first_grades(files, "after", mode)
        chosen: list[str] = []
        for outcome, count in _SHOWN:
            chosen += [p for p in before if p in after and (before[p], after[p]) == outcome][:count]
        if chosen:
            texts = {who: _responses(files, who, mode, chosen) for who in ("before", "after")}
            return [
                comparison
                for problem in chosen
                if (comparison := _compare(problem, mode, prompts.get(problem), texts)) is not None
            ]
    return []


def _first_grades(files: EvaluationFiles, who: Who, mode: Mode) -> dict[str, bool]:
    """True where the first response to a problem is right, in file order."""
    grades: dict[str, bool] = {}
    for row in files.read(who, ["mode", "prompt_id", "correct"]):
        if row["mode"] == mode and row["correct"] is not None:
            grades.setdefault(str(row["prompt_id"]), bool(row["correct"]))
    return grades


def _responses(
    files: EvaluationFiles, who: str, mode: Mode, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """First graded response to each of a few problems. Only their texts are read: there may be many."""
    if not problems:
        return {}
    columns = ["mode", "prompt_id", "response", "answer", "expected", "correct"]
    chosen = set(problems)
    found: dict[str, dict[str, Any]] = {}
    for row in files.read(who, columns, filters=[("prompt_id", "in", problems), ("mode", "=", mode)]):
        if str(row["prompt_id"]) in chosen and row["correct"] is not None:
            found.setdefault(str(row["prompt_id"]), row)
    return found


def _compare(
    problem: str, mode: Mode, prompt: str | None, texts: Mapping[str, Mapping[str, dict[str, Any]]]
) -> BeforeAndAfter | None:
    before, after = texts["before"].get(problem), texts["after"].get(problem)
    if before is None or after is None:
        return None
    expected = after.get("expected") if after.get("expected") is not None else before.get("expected")
    return BeforeAndAfter(
        prompt_id=problem,
        mode=mode,
        prompt=None if prompt is None else shorten(prompt),
        expected=None if expected is None else str(expected),
        before=_answer(before),
        after=_answer(after),
    )


def _answer(row: Mapping[str, Any]) -> GradedAnswer:
    answer = row.get("answer")
    return GradedAnswer(
        text=shorten(str(row.get("response") or "")),
        answer=None if answer is None else shorten(str(answer)),
        correct=bool(row["correct"]),
    )


def shorten(text: str, longest: int = MAX_SHOWN_CHARACTERS) -> str:
    """Beginning and end of a long text."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
