"""Distances of a comparison: over seeds and prompts, and where that is all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tropd.pipeline.report.comparison.comparison import CURVES, Comparison, MethodResult
from tropd.pipeline.report.comparison.comparison_distance import ReportedEstimate, distances_of
from tropd.pipeline.report.comparison.comparison_page import render_comparison
from tropd.storage.catalog import DISTANCES


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "eval").mkdir(parents=True)
    table = pa.Table.from_pylist(
        [{"who": "after", "method": "exact", "acceptance": 0.5, **row} for row in rows], schema=DISTANCES
    )
    pq.write_table(table, folder / "eval" / "distance-after.parquet")
    return folder


def test_means_are_over_the_tokens_of_all_seeds(tmp_path: Path) -> None:
    one = write(
        tmp_path / "0",
        [
            {"prompt_id": "a", "reverse_kl": 1.0, "student_tokens": 2},
            {"prompt_id": "b", "reverse_kl": 4.0, "student_tokens": 4},
            {"prompt_id": "only here", "reverse_kl": 9.0, "student_tokens": 9},
        ],
    )
    other = write(
        tmp_path / "1",
        [
            {"prompt_id": "b", "reverse_kl": 2.0, "student_tokens": 6},
            {"prompt_id": "a", "reverse_kl": 3.0, "student_tokens": 8},
        ],
    )
    found = distances_of([one, other], "after", "tropd")
    assert set(found) == {"reverse_kl", "acceptance", "length"}  # the teacher has written nothing
    assert found["reverse_kl"].mean == pytest.approx((2 + 16 + 12 + 24) / 20)
    assert found["length"].mean == 5
    assert found["acceptance"] == ReportedEstimate(mean=0.5, low=0.5, high=0.5)
    assert distances_of([one, tmp_path / "older"], "after", "tropd") == {}


def test_the_page_does_without_accuracy() -> None:
    estimate = ReportedEstimate(mean=0.25, low=0.2, high=0.3)
    methods = [
        MethodResult(
            objective=name,
            seeds=[0],
            accuracy={},
            per_seed={},
            difference={},
            steps=3,
            tokens_on_policy=10.0,
            teacher_tokens_scored=10.0,
            teacher_topk_tokens=2.0,
            teacher_bytes_received=100.0,
            seconds=1.0,
            curves={curve: [None] for curve in CURVES},
            distance={"reverse_kl": estimate.model_copy(update={"mean": mean}), "length": estimate},
        )
        for name, mean in (("opd", 0.5), ("tropd", 0.25))
    ]
    html = render_comparison(
        Comparison(
            workspace="x",
            baseline="opd",
            problems=0,
            before={},
            teacher={},
            methods=methods,
            distance_before={"reverse_kl": estimate.model_copy(update={"mean": 2.0})},
        )
    )
    assert "tropd comes closest to the teacher: reverse KL 0.250 nats per token (before 2.000)." in html
    assert "before training: reverse KL 2.000. Second lines" in html
    assert "<svg" not in html
