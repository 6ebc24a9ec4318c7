"""Peaks of memory by phase, from a made-up device and from this process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tropd.pipeline.training.record.phase_memory import (
    PhaseMemory,
    memory_metrics,
    of_the_fullest,
    peak_reader,
)
from tropd.pipeline.training.record.trace import Timeline

PHASES = ("rollout", "score", "train")


class Device:
    """Memory that is taken and given back; its peak is forgotten when read."""

    def __init__(self) -> None:
        self.peak = 0

    def take(self, bytes: int) -> None:
        self.peak = max(self.peak, bytes)

    def read(self) -> int:
        peak, self.peak = self.peak, 0
        return peak


def test_each_phase_has_its_own_peak_and_the_step_the_highest() -> None:
    device = Device()
    memory = PhaseMemory(device.read, PHASES)
    with Timeline(None, memory=memory) as timeline:
        device.take(50)  # loading
        with timeline.span("total", 0), timeline.span("wait", 0):
            with timeline.span("rollout", 0):
                device.take(10)
            device.take(90)  # between two phases
            with timeline.span("score", 0):
                device.take(30)
        with timeline.span("train", 0):
            device.take(70)
        device.take(20)
    assert memory.take() == ({"rollout": 10, "score": 30, "train": 70}, 90)
    assert memory.take() == ({"rollout": None, "score": None, "train": None}, 0)


def test_overlapping_phases_have_only_the_peak_of_the_step() -> None:
    device = Device()
    memory = PhaseMemory(device.read, ())
    memory.begin("rollout")
    device.take(10)
    memory.end("rollout")
    assert memory.take() == ({}, 10)


def test_what_the_system_does_not_tell_is_null() -> None:
    memory = PhaseMemory(lambda: None, PHASES)
    memory.begin("train")
    memory.end("train")
    metrics = memory_metrics(torch.device("cpu"), memory)
    assert metrics.pop("memory_rss") > 0
    assert metrics == {"memory_peak_rollout": None, "memory_peak_score": None, "memory_peak_train": None}


def test_of_several_processes_the_fullest_counts() -> None:
    one = {"memory_rss": 5, "memory_peak_train": 7, "memory_peak_score": None}
    other = {"memory_rss": 6, "memory_peak_train": 3, "memory_peak_score": None}
    assert of_the_fullest([one, other]) == {
        "memory_rss": 6,
        "memory_peak_train": 7,
        "memory_peak_score": None,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a process are read from /proc")
def test_the_peak_of_this_process_is_forgotten_when_read() -> None:
    read = peak_reader(torch.device("cpu"))
    if read() is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    before = read()
    large = np.ones(25_000_000)  # 200 MB
    del large
    high, after = read(), read()
    assert before is not None
    assert high is not None
    assert after is not None
    assert high - before > 150e6
    assert high - after > 150e6


def test_a_system_without_proc_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert peak_reader(torch.device("cpu"))() is None
