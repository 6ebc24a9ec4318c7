"""The cases of ``compiled_cases.py``, in a process of their own: whether and what is compiled is global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tropd.pipeline.models.engines.lean.compiled import check_compiler
from tropd.storage.errors import ConfigError


@pytest.mark.timeout(900)  # a compiler on a busy machine
@pytest.mark.slowest
@pytest.mark.first
def test_compiled_models_are_those_they_were_made_from() -> None:
    try:
        check_compiler()
    except ConfigError as error:
        pytest.skip(f"no compiler here: {error}")
    cases = Path(__file__).with_name("compiled_cases.py")
    # The vLLM engine turns the compiler off for the process that it is in, which may be this one.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--show-capture=no", str(cases)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_where_the_compiler_is_turned_off_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    check_compiler.cache_clear()
    check_compiler()
    check_compiler.cache_clear()
    assert "runtime.compile does nothing in this process" in caplog.text
