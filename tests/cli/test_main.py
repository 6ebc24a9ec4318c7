"""Options of the command itself."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from tropd.cli.main import app


def test_the_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert re.fullmatch(r"tropd \d+\.\d+\.\d+\n", done.output)
