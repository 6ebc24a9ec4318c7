"""Shared by the tests of the pipeline: a run with untrained models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random model of one layer and the demo's tokenizer."""
    from tiny_runs import make_models

    return make_models(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_models: Path) -> Any:
    """A run of ten prompts, teacher and student being that model."""
    from tiny_runs import make_run

    return make_run(tmp_path / "run", tiny_models)
