"""Phases of training in a report: from metrics of today, of several processes, and of before they were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tropd.pipeline.report.data.phases import by_process, idle_shares, summarize_phases
from tropd.pipeline.report.data.training_metrics import read_metrics, summarize_training

STEPS = [
    {
        "step": step,
        "time_rollout": 2.0,
        "time_score": 1.0,
        "time_train": seconds,
        "time_total": 10.0,
        "time_queue": 0.5,
        "tokens_on_policy": 300,
        "tokens_guidance": 100,
        "teacher_tokens_scored": 300,
        "memory_peak_rollout": 5e9 + step,
        "memory_peak_train": 9e9 - step,
        "memory_peak_score": None,
        "mfu_train": mfu,
        "exchange_seconds": [1.0, 3.0],
    }
    for step, seconds, mfu in ((0, 1.0, 0.4), (1, 3.0, 0.2))
]


def test_phases_add_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    rows, problems = read_metrics(path)
    assert problems == []
    training = summarize_training(rows, planned_steps=2, stage_seconds=None)
    assert training is not None
    rollout, score, train = training.phases
    assert (rollout.name, rollout.seconds, rollout.tokens_per_second) == ("rollout", 4.0, 150.0)
    assert (rollout.peak_bytes, rollout.mfu) == (5e9 + 1, None)
    assert (score.seconds, score.tokens_per_second, score.peak_bytes) == (2.0, 300.0, None)
    assert (train.seconds, train.tokens_per_second, train.peak_bytes) == (4.0, 200.0, 9e9)
    assert train.mfu == pytest.approx((0.4 * 1 + 0.2 * 3) / 4)  # of all operations, not the mean of the steps
    assert training.idle_shares == pytest.approx([0.1, 0.3])
    assert training.queue_seconds == 1.0


def test_older_metrics_have_the_phases_that_they_have() -> None:
    (train,) = summarize_phases([{"step": 0, "time_train": 2.0, "tokens_on_policy": 10, "time_rollout": 0.0}])
    assert (train.name, train.tokens_per_second, train.peak_bytes, train.mfu) == ("train", 5.0, None, None)
    assert summarize_phases([{"step": 0, "loss": 1.0}]) == []
    (untold,) = summarize_phases([{"step": 0, "time_score": 2.0}])
    assert untold.tokens_per_second is None
    assert idle_shares([{"step": 0, "time_total": 2.0}]) == []
    assert idle_shares([]) == []


def test_a_run_that_was_resumed_with_another_number_of_processes_counts_those_of_its_end() -> None:
    rows = [
        {"time_total": 2.0, **by_process(waits)} for waits in ([0.1, 0.1, 0.1, 0.1], [1.0, 0.5], [0.2, 0.3])
    ]
    assert idle_shares(rows) == pytest.approx([0.3, 0.2])
    assert by_process(None) == by_process("no") == by_process([None]) == {}
