"""Options of the command itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tropd.cli.main import app, main
from tropd.pipeline.run.run import Run
from tropd.pipeline.training import on_gpus
from tropd.storage.errors import InterruptedStageError
from tropd.storage.workspace import Workspace


def test_the_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert re.fullmatch(r"tropd \d+\.\d+\.\d+\n", done.output)


def test_a_stop_on_request_is_no_error_and_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(run: Run, *_: object) -> None:
        raise InterruptedStageError(
            "train: stopped after step 3 of 9", hint=f"run {run.command('train')} to resume"
        )

    workspace = Workspace.create(tmp_path / "w")
    workspace.config_path.write_text('[objective]\nname = "opd"\n')
    monkeypatch.setattr(on_gpus, "train_on", stopped)
    monkeypatch.setattr(sys, "argv", ["tropd", "run", "-w", str(workspace.root)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == InterruptedStageError.exit_code
    told = capfd.readouterr().err
    assert "train: stopped after step 3 of 9" in told
    assert "error" not in told
    assert f"→ run tropd run -w {workspace.root} to resume" in " ".join(told.split())
