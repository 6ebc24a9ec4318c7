"""Verdicts: each is given for a run that shows it, with its numbers, and none for a run that went well."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_checks import text_of

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.data.facts import Contender, Distance, Evaluation, Measure, Report, Verdict
from tropd.pipeline.report.page.page import render_page
from tropd.pipeline.report.verdicts.headline import headline
from tropd.pipeline.report.verdicts.training_verdicts import columns_of, training_verdicts
from tropd.pipeline.report.verdicts.verdict_rules import LIMITS, RULES, Limits
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]
Rows = list[dict[str, Any]]
SETTINGS = {"objective.rollouts": "student", "train.steps": 100, "train.max_grad_norm": 1.0}
TROUBLESHOOTING = Path(__file__).parents[4] / "docs" / "troubleshooting.md"


def found(rows: Rows, **settings: Any) -> list[Verdict]:
    return training_verdicts(
        columns_of(rows), SETTINGS | {k.replace("__", "."): v for k, v in settings.items()}
    )


def changed(rows: Rows, name: str, value: Callable[[int], Any]) -> Rows:
    return [{**row, name: value(row["step"])} for row in rows]


def names(report: Report) -> list[str]:
    return [verdict.name for verdict in report.verdicts]


def page_text(workspace: Workspace) -> str:
    """The page's words, without the plots, which take their time."""
    page = workspace.root / "page.html"
    page.write_text(render_page(build_report(workspace), []), encoding="utf-8")
    return text_of(page)


@pytest.fixture
def rows(tools: Tools) -> Rows:
    """Metrics of a healthy run without prefixes."""
    return [{**row, "prefix_length_mean": 0.0} for row in tools["metric_rows"](100)]


def test_a_healthy_run_has_none(finished: Workspace, rows: Rows) -> None:
    assert build_report(finished).verdicts == []
    assert found(rows) == []
    assert 'id="verdicts"' not in render_page(build_report(finished), [])


@pytest.mark.parametrize(
    ("name", "metric", "value", "says"),
    [
        ("k1-rising", "k1_mean", lambda s: 0.2 + 0.01 * s, "K1 grew from 0.295 to 1.1 nats per token."),
        ("loss-rising", "loss", lambda s: 0.1 + 0.05 * s, "The loss grew from 0.575 to 4.58."),
        (
            "entropy-rising",
            "student_entropy",
            lambda s: 0.5 + 0.02 * s,
            "entropy grew from 0.69 to 2.29 nats",
        ),
        (
            "no-student-token",
            "tokens_on_policy",
            lambda s: 0 if s < 40 else 9,
            "In 40 of 100 steps the student wrote",
        ),
        (
            "never-stops",
            "truncated_fraction",
            lambda s: min(1.0, 0.02 * s),
            "100.0 % of its responses are cut off",
        ),
        ("gradient-clipped", "grad_norm", lambda s: 30.0 + s % 3, "31 at the median, 31 times the limit"),
        ("sampler-mismatch", "sampler_logprob_difference_max", lambda s: 1.5, "up to 1.5 nats on one token"),
        (
            "teacher-retries",
            "teacher_retries",
            lambda s: [0, int(s % 5 == 0)],
            "repeated in 20 of 100 steps.",
        ),
    ],
)
def test_a_metric_that_is_off_is_said(
    rows: Rows, name: str, metric: str, value: Callable[[int], Any], says: str
) -> None:
    (verdict,) = found(changed(rows, metric, value))
    assert verdict.name == name
    assert says in verdict.sentence.replace("\u00a0", " ")
    assert verdict.evidence
    assert verdict.advice == RULES[name].advice
    assert found(changed(rows, metric, value)[:10]) == [] or name in ("no-student-token", "teacher-retries")


def test_trends_name_their_steps(rows: Rows) -> None:
    (verdict,) = found(changed(rows, "k1_mean", lambda s: float(s >= 80)))
    assert verdict.evidence == ["0 in steps 0 to 19, 1 in steps 80 to 99"]


def test_outliers_are_a_share_of_the_students_own_tokens(rows: Rows) -> None:
    shares = [
        {**row, "region_fraction_trust": 0.4, "region_fraction_outlier": 0.004 * row["step"]} for row in rows
    ]
    (verdict,) = found(shares)
    assert verdict.name == "outliers-growing"
    assert "grew from 8.4" in verdict.sentence
    assert "to 47.2" in verdict.sentence


def test_steps_with_prefixes_are_no_part_of_a_trend(rows: Rows) -> None:
    rising = changed(rows, "k1_mean", lambda s: 0.01 * s)
    assert [v.name for v in found(rising)] == ["k1-rising"]
    with_prefix = [{**row, "prefix_length_mean": 25.0 if row["step"] < 90 else 0.0} for row in rising]
    assert found(with_prefix) == []


def test_sure_of_what_the_teacher_rejects(rows: Rows) -> None:
    sure = changed(rows, "student_entropy", lambda s: 0.001)
    assert found(sure) == [], "the teacher accepts it"
    (verdict,) = found(changed(sure, "acceptance_mean", lambda s: 0.6))
    assert verdict.name == "entropy-collapsed"


def test_a_student_that_stays_far_away(rows: Rows) -> None:
    (verdict,) = found(changed(rows, "k1_mean", lambda s: 8.0 - 0.04 * s))
    assert verdict.name == "far-from-teacher"
    assert verdict.evidence == ["7.62 in steps 0 to 19, 4.42 in steps 80 to 99"]


def test_a_teacher_that_goes_on_rejecting(rows: Rows) -> None:
    (verdict,) = found(changed(rows, "acceptance_mean", lambda s: 0.3))
    assert verdict.name == "teacher-rejects"
    assert found(changed(rows, "acceptance_mean", lambda s: 0.1 + 0.003 * s)) == [], "it comes closer"


def test_what_is_so_on_purpose_is_not_said(rows: Rows) -> None:
    apart = changed(rows, "sampler_logprob_difference_max", lambda s: 3.0)
    assert found(apart, objective__rollouts="stored") == []
    nothing = changed(rows, "tokens_on_policy", lambda s: 0)
    assert found(nothing, objective__rollouts="teacher") == []
    assert found(changed(rows, "grad_norm", lambda s: 31.0), train__max_grad_norm=1e9) == []
    assert found(changed(rows, "grad_norm", lambda s: 31.0), train__max_grad_norm=None) == []


def test_a_short_trial_without_a_student_token(rows: Rows) -> None:
    trial = changed(rows[:3], "tokens_on_policy", lambda s: 0)
    assert [v.name for v in found(trial, train__steps=3)] == ["no-student-token"]
    assert found(trial) == [], "three of a hundred steps"
    assert found(changed(rows[:3], "tokens_on_policy", lambda s: 9 * (s > 0)), train__steps=3) == []


def test_columns_of_records_are_those_of_the_report(finished: Workspace, rows: Rows, tools: Tools) -> None:
    """The dashboard and the report say the same of a run."""
    bad = changed(changed(rows, "teacher_retries", lambda s: [1, 2]), "k1_mean", lambda s: 0.02 * s)
    tools["write_metrics"](finished.root, bad)
    assert build_report(finished).verdicts == found(bad)
    assert [v.name for v in found(bad)] == ["k1-rising", "teacher-retries"]


@pytest.mark.parametrize(
    "rows", [[], [{"step": 0}], [{"step": 3, "loss": None, "k1_mean": "x", "teacher_retries": 7}]]
)
def test_odd_records_are_no_trouble(rows: Rows) -> None:
    assert found(rows) == []


def evaluated(
    workspace: Workspace,
    tools: Tools,
    change: Callable[[str, dict[str, Any]], dict[str, Any]],
    problems: int = 60,
) -> Report:
    parts = {
        who: [{**row, **change(who, row)} for row in tools["evaluation_rows"](who, problems)]
        for who in ("before", "after", "teacher")
    }
    tools["write_evaluation"](workspace.root, parts)
    return build_report(workspace)


def test_a_grader_that_finds_nothing(finished: Workspace, tools: Tools) -> None:
    report = evaluated(finished, tools, lambda who, row: {"answer": None, "correct": False})
    assert names(report) == ["grader-misfit"], "nothing else is said of accuracies that mean nothing"
    (verdict,) = report.verdicts
    assert verdict.level == "problem"
    assert verdict.sentence.startswith("The grader 'math' finds no answer in any response of the teacher")
    assert verdict.evidence[0] == "“6+4*7-1=” → “6+4=0;0*7=0;0-1=6;#6”: no answer found, expected “6”"
    assert len(verdict.evidence) == 3
    text = page_text(finished)
    assert verdict.sentence in text
    assert verdict.evidence[2] in text
    assert "Choose the evaluation.grader that fits" in text


def test_a_student_without_answers_is_not_the_graders_fault(finished: Workspace, tools: Tools) -> None:
    report = evaluated(finished, tools, lambda who, row: {"answer": None} if who == "before" else {})
    assert names(report) == []


def test_a_teacher_with_nothing_right(finished: Workspace, tools: Tools) -> None:
    def wrong(who: str, row: dict[str, Any]) -> dict[str, Any]:
        return {"answer": row["prompt_id"], "correct": False} if who == "teacher" else {}

    (verdict,) = evaluated(finished, tools, wrong).verdicts
    assert verdict.name == "teacher-wrong"
    assert "data.chat" in verdict.advice
    assert "answer “eval-2”, expected “6”" in verdict.evidence[2]
    assert names(evaluated(finished, tools, wrong, LIMITS.fewest_problems - 1)) == []


def test_a_teacher_below_the_student(finished: Workspace, tools: Tools) -> None:
    def worse(who: str, row: dict[str, Any]) -> dict[str, Any]:
        return {"correct": int(row["prompt_id"].removeprefix("eval-")) % 2 == 0} if who == "teacher" else {}

    assert names(evaluated(finished, tools, worse)) == ["teacher-behind"]


def test_lengths(finished: Workspace, tools: Tools) -> None:
    def cut(*whom: str) -> list[str]:
        return names(
            evaluated(finished, tools, lambda who, row: {"finish_reason": "length"} if who in whom else {})
        )

    assert cut("before") == []
    assert cut("before", "after") == ["never-stops"]
    assert cut("before", "after", "teacher") == ["short-limit"]


def test_a_student_that_gives_no_answer(finished: Workspace, tools: Tools) -> None:
    report = evaluated(finished, tools, lambda who, row: {"answer": None} if who == "after" else {})
    (verdict,) = report.verdicts
    assert verdict.name == "no-answers"
    alone = [{**row, "answer": None} for row in tools["evaluation_rows"]("after", 60)]
    tools["write_evaluation"](finished.root, {"after": alone})
    assert names(build_report(finished)) == ["no-answers"], (
        "as in a comparison, where the others are beside it"
    )
    assert verdict.sentence.startswith("100.0\u00a0% of the trained student's responses have no answer")
    assert len(verdict.evidence) == 3


def test_what_is_cut_off_is_not_the_graders_fault(finished: Workspace, tools: Tools) -> None:
    cut = {"finish_reason": "length", "answer": None, "correct": False}
    assert names(evaluated(finished, tools, lambda who, row: cut)) == ["short-limit"]


def test_a_student_that_came_no_closer(finished: Workspace, tools: Tools) -> None:
    def moved(before: float, after: float) -> Report:
        there = tools["DISTANCES"]
        far = {"before": before, "after": after}
        summary = {
            who: {**there[who], "reverse_kl": {"mean": kl, "low": 0.9 * kl, "high": 1.1 * kl}}
            for who, kl in far.items()
        }
        parts = {who: tools["evaluation_rows"](who, 60) for who in ("before", "after", "teacher")}
        tools["write_evaluation"](finished.root, parts, distance={**there, **summary})
        return build_report(finished)

    closer, same, farther, there = moved(2.0, 0.5), moved(2.0, 1.95), moved(0.5, 2.0), moved(0.004, 0.005)
    assert [names(one) for one in (closer, same, farther, there)] == [[], ["not-closer"], ["not-closer"], []]
    beginnings = [one.headline.split(":")[0] for one in (closer, same, farther, there)]
    assert beginnings == [
        "The student came closer to the teacher",
        "The student did not come closer to the teacher",
        "The student moved away from the teacher",
        "The student is where the teacher is",
    ]
    assert "reverse KL 2.00 → 0.50, forward KL 0.44 → 0.10 nats per token" in closer.headline
    assert (
        farther.verdicts[0].evidence[0] == "reverse KL: 0.5 [0.45, 0.55] before, 2 [1.8, 2.2] after training"
    )


@pytest.mark.parametrize(
    ("after", "interval", "said"),
    [
        (0.5, (0.3, 0.8), "The student came closer to the teacher: "),
        (0.5, (0.3, 1.9), "The student may have come closer to the teacher: "),
        (0.5, None, "The student may have come closer to the teacher: "),
        (4.0, (2.0, 9.0), "The student may have moved away from the teacher: "),
        (4.0, (3.0, 9.0), "The student moved away from the teacher: "),
    ],
)
def test_the_headline_is_as_sure_as_the_intervals(
    after: float, interval: tuple[float, float] | None, said: str
) -> None:
    def contender(mean: float, between: tuple[float, float] | None) -> Contender:
        unknown = dict.fromkeys(("forward_kl", "acceptance", "length", "truncated", "entropy"))
        measured = Measure(mean=mean, interval=between)
        return Contender(distance=Distance(reverse_kl=measured, prompts=24, method="exact", **unknown))

    found = Evaluation(before=contender(2.0, (1.5, 2.5)), after=contender(after, interval))
    assert headline(found).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [((-1.8, -0.2), "came closer"), ((-1.8, 0.2), "may have come closer"), (None, "may have")],
)
def test_the_headline_goes_by_pairs_of_responses_where_they_are_known(
    change: tuple[float, float] | None, said: str
) -> None:
    unknown = dict.fromkeys(("forward_kl", "acceptance", "length", "truncated", "entropy"))

    def contender(mean: float, between: tuple[float, float]) -> Contender:
        measured = Measure(mean=mean, interval=between)
        return Contender(distance=Distance(reverse_kl=measured, prompts=24, method="exact", **unknown))

    found = Evaluation(
        before=contender(2.0, (0.5, 3.5)),
        after=contender(1.0, (0.2, 1.9)),
        reverse_kl_change=Measure(mean=-1.0, interval=change),
    )
    assert said in headline(found)


def test_rewards_that_tell_nothing_apart(rows: Rows) -> None:
    compared = {"objective.reward.kind": "group"}
    alike = changed(
        changed(rows, "reward_groups_without_spread", lambda s: 0.95), "reward_mean", lambda s: 0.0
    )
    (verdict,) = training_verdicts(columns_of(alike), compared)
    assert verdict.name == "rewards-alike"
    assert verdict.evidence == ["mean reward of a step: 0 to 0"]
    assert training_verdicts(columns_of(alike), {}) == [], "nothing is compared"
    assert training_verdicts(columns_of(alike[:3]), compared) == []
    assert training_verdicts(columns_of([]), compared) == [], "before the first step"
    assert training_verdicts(columns_of(rows), compared) == [], "without that metric"
    learned = changed(rows, "reward_groups_without_spread", lambda s: 1.0 if s > 8 else 0.2)
    assert training_verdicts(columns_of(learned), compared) == [], "all are right at last"


def test_a_distance_that_grows_again(rows: Rows) -> None:
    (verdict,) = found(
        changed(
            rows, "distance_reverse_kl", lambda s: [0.9, 0.4, 0.5, 0.7][s // 25] if s % 25 == 24 else None
        )
    )
    assert verdict.name == "distance-grew"
    assert verdict.evidence == ["least at step 49: 0.4; at step 99: 0.7"]


def test_a_constant_answer(finished: Workspace, tools: Tools) -> None:
    def answers(who: str, row: dict[str, Any], same: str) -> dict[str, Any]:
        expected = str(int(row["prompt_id"].removeprefix("eval-")) % 5)
        given = same if who == "after" and same else expected
        return {"expected": expected, "answer": given, "correct": given == expected}

    report = evaluated(finished, tools, lambda who, row: answers(who, row, "2"))
    assert names(report) == ["constant-answer", "accuracy-fell"], "problems come first"
    assert "100.0\u00a0% of its answers are “2”" in report.verdicts[0].sentence
    assert names(evaluated(finished, tools, lambda who, row: answers(who, row, ""))) == []
    rightly = evaluated(
        finished, tools, lambda who, row: {"expected": "yes", "answer": "yes", "correct": True}
    )
    assert names(rightly) == [], "the problems themselves have one answer"


def test_a_cache_that_keeps_little(finished: Workspace, tools: Tools) -> None:
    summary = {"tokens": 9, "kept_mass": 0.71, "alternatives_per_token": 60.0}
    tools["write_stage"](finished.root, "scores", {"part-00000.parquet": 1}, **summary)
    (verdict,) = build_report(finished).verdicts
    assert (verdict.name, verdict.level) == ("kept-mass", "warning")
    assert "71.0\u00a0%" in verdict.sentence
    assert "scores.k = 5" in verdict.sentence


def test_settings_are_those_that_the_stage_ran_with(finished: Workspace, tools: Tools) -> None:
    """config.toml may have been edited since, or ``--set`` was given."""
    tools["write_metrics"](finished.root, changed(tools["metric_rows"](100), "tokens_on_policy", lambda s: 0))
    assert names(build_report(finished)) == ["no-student-token"]
    path = finished.root / "train" / "manifest.json"
    from tropd.storage.stage.manifest import read_manifest, write_manifest

    manifest = read_manifest(path.parent)
    assert manifest is not None
    write_manifest(
        path.parent, manifest.model_copy(update={"fields": {**manifest.fields, "train.steps": 1000}})
    )
    assert names(build_report(finished)) == []


def test_the_documentation_has_every_verdict_with_its_figures() -> None:
    section = TROUBLESHOOTING.read_text().split("## Verdicts")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", section, re.MULTILINE))
    assert table == {name: f"{rule.threshold()} | {rule.advice}" for name, rule in RULES.items()}
    assert RULES["kept-mass"].threshold(Limits(kept_mass=0.8)) != RULES["kept-mass"].threshold()
    assert f"below {LIMITS.fewest_steps} steps there is no trend" in section
    assert (LIMITS.part, LIMITS.with_prefix) == (1 / 5, 1 / 10), "a fifth, and a tenth, in words"


@pytest.mark.parametrize("name", RULES)
def test_every_setting_that_is_advised_exists(name: str) -> None:
    for path in re.findall(r"`(\w+\.[\w.]+)", f"{RULES[name].advice} {RULES[name].condition}"):
        if path.endswith(".json"):
            continue
        part: Any = parse_config("").config
        for field in path.split("."):
            assert hasattr(part, field), path
            part = getattr(part, field)


def test_verdicts_are_in_the_json(finished: Workspace, tools: Tools) -> None:
    evaluated(finished, tools, lambda who, row: {"answer": None, "correct": False})
    written = json.loads(build_report(finished).model_dump_json())
    assert written["headline"].startswith("The student stayed at 0.0")
    assert written["verdicts"][0].keys() == {"name", "level", "sentence", "evidence", "advice"}


def test_no_difference_is_not_called_chance(finished: Workspace, tools: Tools) -> None:
    evaluated(finished, tools, lambda who, row: {"correct": True})
    text = page_text(finished)
    assert "0 of 60 problems got better, 0 got worse: no difference." in text
    assert "chance alone" not in text
