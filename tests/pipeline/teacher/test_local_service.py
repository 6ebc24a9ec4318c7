"""The local teacher process: starts, fails clearly, stops, and never outlives the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import eventually

from tropd.pipeline.teacher import local_service as process_module
from tropd.pipeline.teacher.local_service import LocalTeacher
from tropd.storage.errors import TropdError

SERVER = "import json, sys; print(json.dumps({'url': 'http://x'}), flush=True); sys.stdin.read()"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_starts_and_stops(tmp_path: Path) -> None:
    with LocalTeacher([sys.executable, "-c", SERVER], tmp_path / "log") as teacher:
        assert teacher.wait() == "http://x"
        process = teacher.process
        assert process is not None
        assert alive(process.pid)
    assert process.returncode == 0


def test_a_child_that_fails_is_explained_by_its_log(tmp_path: Path) -> None:
    code = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    with pytest.raises(TropdError, match=r"exit code 3(.|\n)*no such model"):
        with LocalTeacher([sys.executable, "-c", code], tmp_path / "log") as teacher:
            teacher.wait()


def test_a_child_that_never_answers_is_given_up(tmp_path: Path) -> None:
    teacher = LocalTeacher(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], tmp_path / "log", start_seconds=0.5
    )
    with pytest.raises(TropdError, match="did not start within"):
        with teacher:
            teacher.wait()


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tropd.pipeline.teacher.local_service import LocalTeacher\n"
        f"with LocalTeacher([sys.executable, '-c', {SERVER!r}], Path({str(tmp_path / 'log')!r})) as t:\n"
        "    t.wait(); print(t.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    eventually(lambda: not alive(child), 20, "the child has ended")


def test_ctrl_c_reaches_the_parent_only(tmp_path: Path) -> None:
    server = (
        "import json, signal, sys, pathlib\n"
        f"ended = pathlib.Path({str(tmp_path / 'ended')!r})\n"
        "signal.signal(signal.SIGINT, lambda *_: ended.write_text('interrupted'))\n"
        "print(json.dumps({'url': 'http://x'}), flush=True)\n"
        "sys.stdin.read()\n"
        "if not ended.exists(): ended.write_text('asked to stop')"
    )
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from tropd.pipeline.teacher.local_service import LocalTeacher\n"
        # Ignored where the tests themselves run in a shell's background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"with LocalTeacher([sys.executable, '-c', {server!r}], Path({str(tmp_path / 'log')!r})) as t:\n"
        "    try:\n"
        "        t.wait()\n"
        "        print('up', flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        assert t.process.poll() is None\n"
        "        print('saved', flush=True)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of its foreground group
    assert parent.communicate(timeout=30)[0] == "saved\n"
    assert parent.returncode == 0
    assert (tmp_path / "ended").read_text() == "asked to stop"


def test_only_the_child_s_own_part_of_the_log_explains_it(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "service.log"
    log.parent.mkdir()
    log.write_text("an old failure\n")
    lines = "".join(f"line {i}\n" for i in range(100))
    code = f"import sys; sys.stderr.write({lines!r}); sys.exit(1)"
    with pytest.raises(TropdError, match="exit code 1") as caught:
        with LocalTeacher([sys.executable, "-c", code], log) as teacher:
            teacher.wait()
    assert "line 99" in str(caught.value)
    assert "line 84" not in str(caught.value)
    assert "an old failure" not in str(caught.value)
    assert log.read_text() == "an old failure\n" + lines


def test_whatever_else_the_child_prints_is_passed_over(tmp_path: Path) -> None:
    before = [b"\xff\xfe not UTF-8", b"Loading weights", b"5", b"[]", b'"url"', b"{}", b"null", b"[" * 5000]
    code = (
        f"import json, sys; out = sys.stdout.buffer\nfor line in {before!r}: out.write(line + b'\\n')\n"
        "print(json.dumps({'url': 'http://x'}), flush=True)\n"
        "for _ in range(2000): print('x' * 100, flush=True)\n"  # more than a pipe holds
        "print('done', file=sys.stderr, flush=True); sys.stdin.read()"
    )
    with LocalTeacher([sys.executable, "-c", code], tmp_path / "log", start_seconds=20) as teacher:
        assert teacher.wait() == "http://x"
        eventually(lambda: "done" in (tmp_path / "log").read_text(), 10, "the child has printed it all")


def test_a_child_that_does_not_listen_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "STOP_SECONDS", 0.2)
    deaf = (
        "import json, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(json.dumps({'url': 'http://x'}), flush=True); time.sleep(60)"
    )
    with LocalTeacher([sys.executable, "-c", deaf], tmp_path / "log") as teacher:
        teacher.wait()
        process = teacher.process
    assert process is not None
    assert process.returncode == -signal.SIGKILL


def test_a_child_that_is_given_up_is_ended(tmp_path: Path) -> None:
    teacher = LocalTeacher(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], tmp_path / "log", start_seconds=0.2
    )
    with pytest.raises(TropdError), teacher:
        teacher.wait()
    assert teacher.process is not None
    assert teacher.process.returncode == -signal.SIGTERM


def test_a_child_that_is_still_loading_holds_nothing_up(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        with LocalTeacher([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log") as teacher:
            raise ZeroDivisionError  # as when the run's own input is bad
    assert time.monotonic() - started < process_module.STOP_SECONDS / 2
    assert teacher.process is not None
    assert teacher.process.returncode == -signal.SIGTERM


def test_the_command_is_the_command_line_s_own() -> None:
    command = process_module.serve_command(Path("run"), ["service.port=5", "teacher.model=x"])
    assert command[:4] == [sys.executable, "-m", "tropd.cli.main", "serve-teacher"]
    assert command.count("--set") == 2
    assert command[-3:] == ["0", "--exit-with-parent", "--json"]
