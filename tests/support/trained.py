"""Outcomes of a training run in a workspace, as runs of the same bits have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tropd.storage.formats.step_log import read_log


def metrics(workspace: Path) -> list[dict[str, Any]]:
    """Records without what a clock or the machine measured; a line under way is not there yet."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time_", "memory_"))}
        for record in read_log(workspace / "train" / "metrics.jsonl").whole
    ]


def final(workspace: Path) -> bytes:
    """The weights of the final model."""
    return (workspace / "train" / "final" / "model.safetensors").read_bytes()
