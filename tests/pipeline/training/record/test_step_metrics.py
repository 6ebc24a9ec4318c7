"""Metrics across interruptions: each step once, in the file and for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tropd.pipeline.training.record.step_metrics import BOARD, MetricsLog
from tropd.storage.formats.step_log import StepRecord, read_log
from tropd.storage.workspace import METRICS


def record(step: int, session: int) -> StepRecord:
    return {
        "step": step,
        "loss": step / 4,
        "session": session,
        "bins": [1],
        "nothing": None,
        "time_total": 2.0,
    }


def go(folder: Path, first: int, end: int, session: int) -> str:
    with MetricsLog(folder, first) as log:
        for step in range(first, end):
            log.write(record(step, session))
        log.sync()
    return log.lost


def board(folder: Path) -> list[tuple[str, int, float, float]]:
    """Tag, step, value and time of all that a reader of the plain event files finds."""
    return [
        (
            value.tag,
            event.step,
            value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value,
            event.wall_time,
        )
        for path in sorted((folder / BOARD).iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def test_after_kills_each_step_is_there_once(tmp_path: Path) -> None:
    """Killed before the first checkpoint, and again after one at step 3."""
    assert go(tmp_path, 0, 2, session=1) == ""
    assert go(tmp_path, 0, 5, session=2) == ""
    (events,) = (tmp_path / BOARD).iterdir()
    events.write_bytes(events.read_bytes()[:-7])
    assert go(tmp_path, 3, 6, session=3) == ""
    assert [(r["step"], r["session"]) for r in read_log(tmp_path / METRICS).whole] == [
        (0, 2), (1, 2), (2, 2), (3, 3), (4, 3), (5, 3)
    ]  # fmt: skip
    shown = [(step, value) for tag, step, value, _ in board(tmp_path) if tag == "session"]
    assert shown == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 3.0), (4, 3.0), (5, 3.0)]
    assert [value for tag, _, value, _ in board(tmp_path) if tag == "loss"] == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert {tag for tag, *_ in board(tmp_path)} == {"loss", "session", "time_total"}
    times = [time for tag, _, _, time in board(tmp_path) if tag == "loss"]
    assert times == sorted(times)
    assert times[2] - times[0] == pytest.approx(4.0, abs=1e-3)


def test_what_only_tensorboard_still_has_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    go(folder, 0, 4, session=1)
    (events,) = (folder / BOARD).iterdir()
    content = events.read_bytes()
    (folder / METRICS).unlink()
    assert "has no record of step 0 to 2" in go(folder, 3, 4, session=2)
    assert (tmp_path / "damaged" / "train" / BOARD / events.name).read_bytes() == content
