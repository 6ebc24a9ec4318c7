"""Reading and adding up training metrics, whatever state their file is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tropd.pipeline.report.data.training_metrics import MetricsRow, read_metrics, summarize_training


def summarize(rows: list[MetricsRow], stage_seconds: float | None = None) -> dict[str, object]:
    training = summarize_training(rows, planned_steps=10, stage_seconds=stage_seconds)
    assert training is not None
    return training.model_dump()


def test_a_missing_file_is_no_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])
    assert summarize_training([], planned_steps=10, stage_seconds=None) is None


def test_a_torn_last_line_is_left_out_silently_and_a_bad_middle_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1}\n{"step": 1, "lo')
    assert read_metrics(path) == ([{"step": 0, "loss": 1}], [])
    path.write_bytes(b'{"step": 0, "loss": 1}\n\xff\xfe\n[1]\n{"step": 2, "loss": 2}\n')
    rows, problems = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 2]
    assert problems == ["train: 2 unreadable line(s) in metrics.jsonl are left out"]


def test_a_repeated_step_counts_once_as_it_was_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    entries = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 9.0}, {"step": 1, "loss": 2.0}]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    rows, _ = read_metrics(path)
    assert rows == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}]


def test_values_that_are_not_finite_or_not_numbers_are_dropped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 3, "loss": NaN, "ok": true, "histogram": [1], "x": null}\n{"step": 4, "loss": Infinity}\n'
    )
    rows, problems = read_metrics(path)
    assert rows == [{"step": 3}, {"step": 4}]
    assert problems == ["train: loss is not a finite number at step 3 and 1 more"]


def test_sums_are_null_when_unknown_and_exact_otherwise() -> None:
    got = summarize([{"step": 0, "tokens_on_policy": 5}, {"step": 1, "tokens_on_policy": 7}])
    assert got["tokens_on_policy"] == 12
    assert got["teacher_topk_tokens"] is None
    assert got["steps"] == 2


def test_region_fractions_are_weighted_by_tokens() -> None:
    rows: list[MetricsRow] = [
        {"step": 0, "tokens_on_policy": 10, "tokens_guidance": 90, "region_fraction_trust": 0.1},
        {"step": 1, "tokens_on_policy": 300, "tokens_guidance": 0, "region_fraction_trust": 0.9},
    ]
    fraction = summarize(rows)["region_fraction"]
    assert fraction == {"trust": pytest.approx(0.7), "outlier": None, "guidance": None}
    unweighted = summarize([{"step": s, "region_fraction_trust": s / 2} for s in range(3)])
    assert unweighted["region_fraction"] == {"trust": pytest.approx(0.5), "outlier": None, "guidance": None}


def test_an_evaluation_alone_is_not_a_step_but_is_in_the_curve() -> None:
    got = summarize([{"step": -1, "accuracy_greedy": 0.1}, {"step": 0, "loss": 1.0, "accuracy_greedy": 0.2}])
    assert got["steps"] == 1
    assert got["series"] == {"step": [-1, 0], "accuracy_greedy": [0.1, 0.2], "loss": [None, 1.0]}


def test_time_beyond_the_steps_is_other() -> None:
    rows: list[MetricsRow] = [{"step": 0, "time_rollout": 1.0, "time_train": 2.0, "time_total": 3.5}]
    assert summarize(rows)["seconds"] == {"rollout": 1.0, "train": 2.0, "other": pytest.approx(0.5)}
    assert summarize(rows, stage_seconds=10.0)["seconds"] == {"rollout": 1.0, "train": 2.0, "other": 7.0}
