"""Most memory in each phase of a step: of the GPU as PyTorch allocates it, or on a CPU of the process.

Only where phases follow one another: of two that overlap, neither has a peak of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import psutil
import torch

from tropd.storage.formats.step_log import StepRecord

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to ``clear_refs`` it makes the resident memory of now the peak (proc(5), Linux 4.0), for getrusage too."""


class PhaseMemory:
    """Collects peaks by phase; a ``Timeline`` says when one begins and ends.

    Args:
        read: gives the most bytes since it was last called; None where that is not known.
        phases: the spans to tell apart; none where they overlap.
    """

    def __init__(self, read: Callable[[], int | None], phases: Collection[str]) -> None:
        self._read = read
        self._phases = phases
        self._most: dict[str, int] = {}

    def begin(self, name: str) -> None:
        if name in self._phases:
            self._note("")

    def end(self, name: str) -> None:
        if name in self._phases:
            self._note(name)

    def take(self) -> tuple[dict[str, int | None], int | None]:
        """Bytes by phase since the last call, and the most in and between all of them; None where not known."""
        self._note("")
        most, self._most = self._most, {}
        return {name: most.get(name) for name in self._phases}, max(most.values(), default=None)

    def _note(self, name: str) -> None:
        peak = self._read()
        if peak is not None:
            self._most[name] = max(peak, self._most.get(name, 0))


def peak_reader(device: torch.device) -> Callable[[], int | None]:
    """Reads and forgets the device's peak in bytes: of this process's tensors on a GPU, else its resident memory."""

    def gpu() -> int:
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    return gpu if device.type == "cuda" else _resident_peak


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        _RESET.write_text(_RESET_PEAK)
    except OSError:  # no Linux, or a sandbox that forbids it
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def memory_metrics(device: torch.device, memory: PhaseMemory) -> StepRecord:
    """Main memory of this process now, the most of its GPU since the last step, and of each phase, in bytes."""
    phases, most = memory.take()
    record: StepRecord = {"memory_rss": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        record["memory_gpu_peak"] = most
    return record | {f"memory_peak_{name}": peak for name, peak in phases.items()}


def of_the_fullest(processes: Sequence[StepRecord]) -> StepRecord:
    """Of each number of memory the largest over the processes; None where none of them knows it."""
    known = {name: [taken[name] for taken in processes if taken[name] is not None] for name in processes[0]}
    return {name: max(values, default=None) for name, values in known.items()}
