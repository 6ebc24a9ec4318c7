"""Processes of one piece of work: a failure ends all, a request to stop is passed on, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import eventually

from tropd.pipeline.run.processes import together
from tropd.pipeline.run.processes.together import Child, run_together
from tropd.storage.errors import TropdError

HINT = "look"
# A rank: it says its pid, saves something when it is asked to stop, and ends once its starter is gone.
RANK = """
import os, pathlib, signal, sys, time
from tropd.pipeline.run.processes.together import follow_starter
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
def save(*_):
    time.sleep(0.3)
    with (folder / f"saved-{number}").open("a") as file:
        file.write("saved ")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
follow_starter()
(folder / f"pid-{number}").write_text(str(os.getpid()))
time.sleep(60)
"""
STARTER = """
import os, pathlib, sys
from tropd.pipeline.run.processes.together import Child, run_together
folder = pathlib.Path(sys.argv[1])
children = [Child(f"process {n}", [sys.executable, "-c", sys.argv[2], str(folder), str(n)], os.environ,
                  None if n == 0 else folder / f"log-{n}") for n in range(2)]
sys.exit(run_together("work", children, "look"))
"""


def child(code: str, log: Path | None, name: str = "process") -> Child:
    return Child(name, [sys.executable, "-c", code], os.environ, log)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process that has started two ranks, and their ids."""
    process = subprocess.Popen([sys.executable, "-c", STARTER, str(folder), RANK], start_new_session=True)
    paths = [folder / f"pid-{number}" for number in range(2)]
    eventually(lambda: all(p.exists() and p.read_text() for p in paths), 60, "both ranks run")
    return process, [int(path.read_text()) for path in paths]


def test_all_that_end_well_are_waited_for(tmp_path: Path) -> None:
    codes = ["print('one')", "import time; time.sleep(0.3); print('two')"]
    assert run_together("work", [child(code, tmp_path / "log") for code in codes], HINT) == 0
    assert set((tmp_path / "log").read_text().split()) == {"one", "two"}


def test_one_that_fails_ends_the_others_and_its_log_is_shown(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("of an earlier run\n")
    waits = child("import time; time.sleep(60)", tmp_path / "good", "process 0")
    fails = child("import sys; print('no memory'); sys.exit(7)", tmp_path / "bad", "process 1")
    before = time.monotonic()
    with pytest.raises(
        TropdError, match=r"work: process 1 of 2 ended with exit code 7(.|\n)*no memory"
    ) as caught:
        run_together("work", [waits, fails], HINT)
    assert time.monotonic() - before < 30
    assert "earlier" not in caught.value.message
    assert caught.value.hint == HINT


def test_a_killed_one_is_said_to_be_killed(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(TropdError, match=r"was killed \(SIGKILL\)"):
        run_together("work", [child(code, tmp_path / "log")], HINT)


def test_a_refusal_that_was_seen_is_not_told_again(tmp_path: Path) -> None:
    said = child("import time; time.sleep(0.2); raise SystemExit(2)", None)
    logged = child("raise SystemExit(2)", tmp_path / "log")
    assert run_together("work", [said, logged], HINT) == 2


def test_ones_that_do_not_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "GRACE_SECONDS", 0.3)
    deaf = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    fails = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\nraise SystemExit(1)"
    with pytest.raises(TropdError, match="exit code 1"):
        run_together("work", [child(deaf, tmp_path / "a"), child(fails, tmp_path / "b")], HINT)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_request_to_stop_reaches_each_once_and_is_waited_for(tmp_path: Path) -> None:
    process, pids = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 130
    assert [(tmp_path / f"saved-{number}").read_text() for number in range(2)] == ["saved "] * 2
    assert not any(alive(pid) for pid in pids)


def test_all_end_when_their_starter_is_killed_and_save_before(tmp_path: Path) -> None:
    process, pids = started(tmp_path)
    process.kill()
    process.wait()
    eventually(lambda: not any(alive(pid) for pid in pids), 30, "both ranks have ended")
    assert all((tmp_path / f"saved-{number}").exists() for number in range(2))
