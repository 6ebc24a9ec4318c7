"""Calls of the driver: no environment, a gated dataset, no time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from lighteval_stand_in import make_environment

from tropd.pipeline.stages.evaluation.harness.environment import (
    REQUIREMENTS,
    call_driver,
    has_environment,
)
from tropd.storage.errors import ConfigError, TropdError


def test_a_missing_environment_is_named_with_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROPD_BENCH_HARNESS", str(tmp_path / "nowhere"))
    assert not has_environment()
    with pytest.raises(ConfigError, match="'GPQA-Diamond' is judged by lighteval") as caught:
        call_driver("GPQA-Diamond", [], seconds=1, log=tmp_path / "log")
    assert "make bench-harness" in str(caught.value.hint)


def test_a_gated_dataset_asks_for_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROPD_BENCH_HARNESS", str(make_environment(tmp_path / "environment")))
    wanted = {"task": "gpqa:diamond", "module": "lighteval.tasks.tasks.gpqa", "metric": None}
    arguments = ["questions", json.dumps(wanted), str(tmp_path / "questions"), str(tmp_path / "records")]
    with pytest.raises(ConfigError, match="GPQA is not open to this account") as caught:
        call_driver("GPQA", arguments, seconds=60, log=tmp_path / "log")
    assert "HF_TOKEN" in str(caught.value.hint)


def test_what_takes_too_long_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = make_environment(tmp_path / "environment")
    monkeypatch.setenv("TROPD_BENCH_HARNESS", str(environment))
    (environment / "bin" / "python").write_text("#!/bin/sh\necho waiting\nsleep 600 | cat\n")
    start = time.monotonic()
    with pytest.raises(TropdError, match=r"did not end within 0 s on LCB:\s+waiting"):
        call_driver("LCB", [], seconds=0.4, log=tmp_path / "log")
    assert time.monotonic() - start < 20


def test_the_environment_has_the_torch_of_this_one() -> None:
    """It must not bring another build, such as one for CUDA where the constraints have one for the CPU."""
    constraints = (Path(__file__).parents[5] / "constraints.txt").read_text().splitlines()
    (torch,) = [line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch==")]
    assert torch in constraints
