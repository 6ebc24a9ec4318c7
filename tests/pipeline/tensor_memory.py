"""Memory of tensors, as PyTorch's profiler counts it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity


def peak_bytes(work: Callable[[], Any], folder: Path) -> int:
    """Most bytes that are held at once while ``work`` runs, those inside PyTorch's functions included."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [int(event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(sizes))
