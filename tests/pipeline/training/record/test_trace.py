"""Seconds per step and name, from any thread, and the trace file."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.training.record.trace import Timeline


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    return found


def test_spans_of_a_step_add_up_and_are_taken_once() -> None:
    with Timeline(None) as timeline:
        for _ in range(2):
            with timeline.span("train", 3):
                time.sleep(0.02)
        with timeline.span("train", 4):
            pass
        seconds = timeline.take(3)
        assert list(seconds) == ["train"]
        assert seconds["train"] >= 0.04
        assert timeline.take(3) == {}
        assert timeline.take(4)["train"] < 0.02


def test_a_span_that_ends_with_an_error_counts() -> None:
    with Timeline(None) as timeline:
        with pytest.raises(ValueError, match="no"), timeline.span("score", 0):
            raise ValueError("no")
        assert "score" in timeline.take(0)


def test_the_trace_names_threads_and_is_continued_by_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path) as timeline:
        with timeline.span("train", 0):
            with timeline.span("wait", 0):
                pass

        def roll() -> None:
            with timeline.span("rollout", 1):
                time.sleep(0.01)

        thread = threading.Thread(target=roll, name="aside")
        thread.start()
        thread.join()
    with Timeline(path) as timeline, timeline.span("train", 1):
        pass
    found = events(path)
    names = {e["tid"]: e["args"]["name"] for e in found if e["ph"] == "M"}
    assert "aside" in names.values()
    spans = [e for e in found if e["ph"] == "X"]
    assert [(e["name"], e["args"]["step"]) for e in spans] == [
        ("wait", 0),
        ("train", 0),
        ("rollout", 1),
        ("train", 1),
    ]
    assert spans[2]["dur"] >= 10_000
    assert names[spans[2]["tid"]] == "aside"
    assert spans[0]["ts"] >= spans[1]["ts"]


def test_a_torn_line_of_a_killed_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path) as timeline, timeline.span("train", 0):
        pass
    path.write_text(path.read_text()[:-20])
    with Timeline(path) as timeline, timeline.span("train", 1):
        pass
    assert [e["args"].get("step") for e in events(path) if e["ph"] == "X"] == [1]


def test_spans_of_other_processes_are_in_the_trace_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(None, rank=1, collects=True) as other:
        with other.span("rollout", 0):
            pass
        lines = other.take_events()
        assert other.take_events() == []
    with Timeline(path) as timeline:
        with timeline.span("rollout", 0):
            pass
        timeline.add(lines)
    assert [e["ph"] for e in events(path)].count("X") == 2
    assert {"process 1"} == {e["args"]["name"] for e in events(path) if e["name"] == "process_name"}


def test_nothing_is_collected_where_no_trace_is_wanted() -> None:
    with Timeline(None, rank=1) as timeline:
        with timeline.span("train", 0):
            pass
        assert timeline.take_events() == []


def test_processes_of_two_machines_with_the_same_number_are_two(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Timeline(path) as first, Timeline(None, rank=1, collects=True) as second:
        for timeline in (first, second):
            with timeline.span("train", 0):
                pass
        first.add(second.take_events())
    assert len({event["pid"] for event in events(path)}) == 2
