"""Distances in the report: as data, in the table, and where there is nothing but them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.data.distances import distance_note, distance_rows, read_distances
from tropd.pipeline.report.page.page import render_page
from tropd.storage.stage.manifest import describe_shard, read_manifest, write_manifest
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


def test_the_change_is_that_of_pairs(finished: Workspace, tools: Tools) -> None:
    """A far prompt is far before and after: the difference is the same for all, whatever their spread."""
    folder = finished.root / "eval"
    far = [0.1 * i for i in range(24)]
    for who, less in (("before", 0.0), ("after", 0.25)):
        rows = [
            {"who": who, "prompt_id": f"p{i}", "reverse_kl": kl - less, "student_tokens": 5}
            for i, kl in enumerate(far)
        ]
        rows.append({"who": who, "prompt_id": f"only {who}", "reverse_kl": 99.0, "student_tokens": 5})
        rows.append({"who": who, "prompt_id": "empty", "reverse_kl": None, "student_tokens": None})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"distance-{who}.parquet")
    manifest = read_manifest(folder)
    assert manifest is not None
    added = {
        f"distance-{who}.parquet": describe_shard(folder, f"distance-{who}.parquet", 26)
        for who in ("before", "after")
    }
    write_manifest(folder, manifest.model_copy(update={"shards": manifest.shards | added}))
    evaluation = build_report(finished).evaluation
    assert evaluation.reverse_kl_change is not None
    assert evaluation.reverse_kl_change.mean == pytest.approx(-0.25)
    assert evaluation.reverse_kl_change.interval == (pytest.approx(-0.25), pytest.approx(-0.25))
    assert "Prompt by prompt, training changed the reverse KL by \u22120.25 " in distance_note(evaluation)
    (folder / "distance-after.parquet").write_bytes(b"torn")
    report = build_report(finished)
    assert report.evaluation.reverse_kl_change is None
    assert any("distance-after.parquet" in line for line in report.missing)


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
