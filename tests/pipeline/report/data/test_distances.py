"""Distances in the report: as data, in the table, and where there is nothing but them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.data.distances import distance_note, distance_rows, read_distances
from tropd.pipeline.report.page.page import render_page
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]


def test_the_report_has_means_and_intervals(finished: Workspace) -> None:
    found = build_report(finished).model_dump(mode="json")["evaluation"]
    after = found["after"]["distance"]
    assert after["reverse_kl"] == {"mean": 0.128, "interval": [pytest.approx(0.118), pytest.approx(0.138)]}
    assert (after["prompts"], after["method"]) == (64, "exact")
    assert found["teacher"]["distance"]["reverse_kl"] is None
    assert found["teacher"]["distance"]["length"]["mean"] == 26.4


def test_the_table_says_what_was_measured(finished: Workspace) -> None:
    evaluation = build_report(finished).evaluation
    rows = {row["who"]: [cell["value"] for cell in row["cells"]] for row in distance_rows(evaluation)}
    assert rows["after"] == ["0.128", "0.104", "0.930", "26.4"]
    assert rows["teacher"] == ["0", "0", "1", "26.4"]
    assert "On 64 held-out prompts, exactly" in distance_note(evaluation)


def test_problems_without_answers_are_no_lack(finished: Workspace, tools: Tools) -> None:
    empty: dict[str, Any] = {who: [] for who in ("before", "after", "teacher")}
    tools["write_evaluation"](finished.root, empty, distance=tools["DISTANCES"])
    report = build_report(finished)
    assert report.missing == []
    html = render_page(report, [])
    assert 'id="distance"' in html
    assert 'id="outcome"' not in html
    assert "no data" not in html


@pytest.mark.parametrize(
    "found", [None, 7, [], {"after": None}, {"after": {"reverse_kl": 3}}, {"after": {"prompts": "many"}}]
)
def test_what_cannot_be_read_is_no_distance(found: Any) -> None:
    assert read_distances({"distance": found}) == {}
