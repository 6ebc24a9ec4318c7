"""Makes the helpers next to the storage tests importable (``storage_samples``), and spares the disk."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: flushing would only make the suite wait for whatever else the disk is doing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
