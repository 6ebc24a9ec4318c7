"""tropd init: the two ways, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tropd.cli.main import app
from tropd.storage.errors import ConfigError

OWN = ("--teacher", "/models/t", "--student", "/models/s")


@pytest.mark.parametrize(
    "options",
    [
        (),
        OWN,
        ("--prompts", "p.jsonl"),
        (*OWN, "--prompts", "p", "--recipe", "demo"),
        ("--recipe", "demo", *OWN),
    ],
)
def test_half_a_way_shows_both(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new run"), *options])
    assert isinstance(done.exception, ConfigError)
    hint = str(done.exception.hint)
    assert "--teacher /models/large --student /models/small --prompts prompts.jsonl" in hint
    assert f"tropd init '{tmp_path}/new run' --recipe demo" in hint
    assert not (tmp_path / "new run").exists()


def test_a_recipe_as_before(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "run"), "--recipe", "demo"])
    assert done.exit_code == 0, done.output
    assert 'recipe = "demo"' in (tmp_path / "run" / "config.toml").read_text()
    again = CliRunner().invoke(app, ["init", str(tmp_path / "run"), "--recipe", "demo"])
    assert "exists already" in str(again.exception)


def test_own_models_are_looked_at(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(5)))
    options = (*OWN, "--prompts", str(prompts))
    done = CliRunner().invoke(app, ["init", str(tmp_path / "run"), *options])
    assert "/models/t does not exist" in str(done.exception)
    assert not (tmp_path / "run").exists()
