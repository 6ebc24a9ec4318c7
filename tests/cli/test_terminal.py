"""Output that any terminal and pipe takes, whatever models, paths and libraries say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner
from waiting import eventually

from tropd.cli import render
from tropd.cli.dashboard import BLOCKS
from tropd.cli.main import app
from tropd.cli.terminal import SPELLED, shown, wants_debug
from tropd.pipeline.config.recipe_files import recipe_names, recipe_text
from tropd.storage.workspace import Workspace

HOSTILE = "[bold]b[/] [/nothing] :warning: \x1b[31mred\x1b[0m \x00 \x9b5m \r \u202e \x7f"
SPELT = r"[bold]b[/] [/nothing] :warning: \x1b[31mred\x1b[0m \x00 \x9b5m \x0d \u202e \x7f"


def tropd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "tropd.cli.main", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace.create(tmp_path / "[bold]r[/] [/x]")
    made.config_path.write_text(recipe_text("demo"))
    return made


def test_every_text_of_tropd_can_be_spelled_in_ascii() -> None:
    texts = [
        BLOCKS,
        "→ … ± − × ‖ π 模型 \udc80",
        *(recipe_text(name, "objectives") for name in recipe_names("objectives")),
    ]
    for text in texts:
        spelled = text.encode("ascii", SPELLED).decode()
        assert len(spelled) >= len(text)
    assert "a → b… 95 ± 2 模".encode("ascii", SPELLED) == rb"a -> b... 95 +- 2 \u6a21"
    assert "\udc80é".encode("utf-8", SPELLED) == b"\\udc80\xc3\xa9"


def test_commands_write_ascii_where_nothing_else_is_taken(workspace: Workspace) -> None:
    root = str(workspace.root)
    for arguments in (["objectives", "show", "tropd"], ["status", "-w", root], ["train", "-w", f"{root}é→"]):
        done = tropd(*arguments, PYTHONIOENCODING="ascii", LC_ALL="C")
        assert (done.stdout + done.stderr).isascii()
        assert b"Error" not in done.stderr
        assert done.returncode == (2 if arguments[0] == "train" else 0)
    done = tropd(
        "config", "show", "-w", root, "--set", "data.prompts=é\x9b", "--json", PYTHONIOENCODING="ascii"
    )
    assert json.loads(done.stdout)["data"]["prompts"] == "é\x9b"


def test_markup_and_controls_in_texts_are_text(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(f"{HOSTILE}\n\t") == f"{SPELT}\n\t"
    render.print_table((HOSTILE,), [(HOSTILE,)], title=HOSTILE)
    render.say(HOSTILE)
    render.tell(HOSTILE)
    render.make_reporter().warning(HOSTILE)
    render.print_json(HOSTILE)
    written = capsys.readouterr()
    assert written.out.count(SPELT) == 4
    assert written.err == f"{SPELT}\nwarning: {SPELT}\n"
    assert "\x9b" not in written.out
    assert json.loads(written.out.splitlines()[-1]) == HOSTILE


def test_a_progress_bar_takes_markup_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, markup=False, emoji=False)
    monkeypatch.setattr(render, "stderr", console)
    with render.make_reporter().task("[bold]x[/] [/y]", 1) as task:
        task.advance(1, last="[/z]")
    assert "[bold]x[/] [/y]" in stream.getvalue()
    assert "[/z]" in stream.getvalue()


def test_what_status_advises_is_the_path_as_it_is(workspace: Workspace) -> None:
    done = CliRunner().invoke(app, ["status", "-w", str(workspace.root)])
    assert f"tropd prepare -w '{workspace.root}'" in done.output.replace("\n", "")
    explained = CliRunner().invoke(
        app,
        ["config", "explain", "data.prompts", "-w", str(workspace.root), "--set", "data.prompts=[b]x[/b]"],
    )
    assert "data.prompts = '[b]x[/b]'" in explained.output


@pytest.mark.parametrize(
    ("value", "on"), [("", False), ("0", False), ("False", False), ("no", False), ("1", True)]
)
def test_debug_is_off_when_it_says_so(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROPD_DEBUG", value)
    assert wants_debug() is on


LIBRARY = """
import logging, os, subprocess, sys, warnings
from tropd.cli.main import app
app(["objectives", "show", "opd"], standalone_mode=False)
logging.getLogger("math_verify").warning("Timeout is disabled")
warnings.warn("deprecated")
logging.getLogger("tropd.pipeline").warning("ours")
sys.exit(subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('of a child')"]).returncode)
"""


def test_libraries_do_not_chat() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "tropd.pipeline: ours"


def test_nothing_is_silent_while_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(render, "PLAIN_INTERVAL_SECONDS", 0.05)
    stream = io.StringIO()
    monkeypatch.setattr(render, "stderr", Console(file=stream, force_terminal=False, markup=False))
    with render.make_reporter().waiting("loading [x]"):
        eventually(lambda: stream.getvalue().count("\n") >= 2, 20, "it says for how long")
    assert stream.getvalue().startswith("loading [x] …\nloading [x]: 0 s\n")
    monkeypatch.setattr(render, "PATIENCE_SECONDS", 60)
    said = stream.getvalue()
    with render.make_reporter().waiting("loading"):
        pass
    assert stream.getvalue() == said


def test_a_terminal_shows_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(render, "stderr", Console(file=stream, force_terminal=True, width=80))
    reporter = render.make_reporter()
    with reporter.task("outer", 2), reporter.waiting("loading [x] from y"):
        pass
    assert "loading [x] from y" in stream.getvalue()


SLOW_IMPORT = """
import sys, time
from tropd.cli import main, render
render.PATIENCE_SECONDS = 0.1
main.app = lambda **_: time.sleep(0.5)
main.main()
"""


def test_the_first_line_comes_before_the_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_IMPORT], capture_output=True, text=True, check=True)
    assert done.stderr == "loading libraries …\n"
    assert tropd("objectives", "show", "opd").stderr in (b"", "loading libraries …\n".encode())


def test_memory_that_ends_anywhere_is_no_internal_error() -> None:
    code = "from tropd.cli import main; main.app = lambda **_: bytearray(2**62); main.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tropd: does not fit into main memory")
