"""The report's benchmark table, from whole and from damaged summaries."""

from __future__ import annotations

from typing import Any

import pytest

from tropd.pipeline.report.data.benchmarks import BenchmarkCell, BenchmarkRow, benchmark_rows
from tropd.pipeline.report.data.facts import Evaluation, Report, StageReport


def report(summary: Any) -> Report:
    stage = StageReport(
        command="tropd evaluate",
        state="complete",
        done=None,
        total=None,
        unit="parts",
        rows=0,
        bytes=0,
        seconds=None,
        fingerprint=None,
        summary=summary,
    )
    return Report.model_construct(stages={"eval": stage}, evaluation=Evaluation(), config=None)


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def sampled(samples: int, value: float, **pass_at: float) -> dict[str, Any]:
    return {
        "samples": samples,
        "problems": 30,
        "average": estimate(value),
        "pass_at": {k.removeprefix("k"): estimate(v) for k, v in pass_at.items()},
    }


def test_averages_passes_and_metrics_of_the_harness_are_rows() -> None:
    summary = {
        "sampled": {
            "eval": {"before": sampled(1, 0.4)},
            "AIME24": {"before": sampled(32, 0.3, k8=0.5), "after": sampled(32, 0.4, k8=0.6)},
        },
        "harness": {
            "IFEval": {"after": [{"name": "acc", "value": 0.25, "stderr": 0.05}]},
            "Chess": {"teacher": [{"name": "elo", "value": 1712.0, "stderr": None}]},
        },
    }
    assert benchmark_rows(report(summary)) == [
        BenchmarkRow(
            "AIME24",
            "avg@32",
            {
                "before": BenchmarkCell("30.0\u00a0%", "20.0\u00a0% to 40.0\u00a0%"),
                "after": BenchmarkCell("40.0\u00a0%", "30.0\u00a0% to 50.0\u00a0%"),
            },
        ),
        BenchmarkRow(
            "AIME24",
            "pass@8",
            {
                "before": BenchmarkCell("50.0\u00a0%", "40.0\u00a0% to 60.0\u00a0%"),
                "after": BenchmarkCell("60.0\u00a0%", "50.0\u00a0% to 70.0\u00a0%"),
            },
        ),
        BenchmarkRow("IFEval", "acc", {"after": BenchmarkCell("25.0\u00a0%", "± 5.0\u00a0%")}),
        BenchmarkRow("Chess", "elo", {"teacher": BenchmarkCell("1712", "")}),
    ]


def test_the_run_s_own_problems_are_there_when_several_responses_are() -> None:
    rows = benchmark_rows(report({"sampled": {"eval": {"after": sampled(4, 0.5, k2=0.7)}}}))
    assert [(row.benchmark, row.metric) for row in rows] == [
        ("held-out problems", "avg@4"),
        ("held-out problems", "pass@2"),
    ]


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"sampled": None, "harness": 3},
        {"sampled": {"AIME24": {"before": {"average": {"value": None}}}}},
        {"sampled": {"AIME24": {"before": "x", "nobody": sampled(2, 0.5)}}},
        {"harness": {"IFEval": {"after": ["x", {"value": True}]}}},
    ],
)
def test_damaged_summaries_have_no_rows(summary: Any) -> None:
    assert benchmark_rows(report(summary)) == []


def test_the_paper_s_number_stands_beside_ours_where_a_recipe_makes_its_row() -> None:
    summary = {"sampled": {name: {"after": sampled(32, 0.4, k8=0.5)} for name in ("AIME24", "AMC23")}}
    made = report(summary).model_copy(
        update={"config": {"run": {"recipe": "r1-distill-1.5b-math"}, "objective": {"name": "tropd"}}}
    )
    papers = {(row.benchmark, row.metric): row.paper for row in benchmark_rows(made)}
    assert papers["AMC23", "avg@32"] == 77.03
    assert papers["AMC23", "pass@8"] is None
    other = made.model_copy(update={"config": {"run": {"recipe": "demo"}, "objective": {"name": "tropd"}}})
    assert all(row.paper is None for row in benchmark_rows(other))
