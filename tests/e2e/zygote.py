"""A process that has everything imported and runs ``tropd`` command lines in forked children.

Reads one JSON command per line: {"argv": [...], "after": seconds | null, "signal": number, "file_limit": bytes | null,
"stop_at": step | null}.
Answers {"code": exit code or -signal, "seconds": …, "output": …}. Forking saves the import time of each command line;
nothing but imports has happened here, so the children are as good as new processes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import tropd.cli.main
import tropd.pipeline.experiments.compare
import tropd.pipeline.experiments.demo.prepare
import tropd.pipeline.experiments.reproduce
import tropd.pipeline.report.page.page
import tropd.pipeline.teacher.service.serve
import tropd.pipeline.training.loop
import tropd.storage.catalog
import tropd.storage.verify.verify
from tropd.pipeline.training.record.step_metrics import MetricsLog
from tropd.storage.formats.step_log import StepRecord


def child(command: dict[str, object], output: Path) -> None:
    os.setsid()
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if command.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(str(command["file_limit"])),) * 2)
    if command.get("stop_at") is not None:
        stop_at(int(str(command["stop_at"])))
    sys.argv = ["tropd", *command["argv"]]  # type: ignore[misc]
    try:
        tropd.cli.main.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def stop_at(step: int) -> None:
    """Be sent SIGINT when a step is on record: a training run that is interrupted at the same place every time."""
    write = MetricsLog.write

    def write_and_stop(log: MetricsLog, record: StepRecord) -> None:
        write(log, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    MetricsLog.write = write_and_stop  # type: ignore[method-assign]


def wait(pid: int, seconds: float) -> int | None:
    """Exit status of a child, or None if it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def main() -> None:
    output = Path(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(command, output)
        status = None
        if command.get("after") is not None:
            status = wait(pid, float(command["after"]))
            if status is None:
                # Only the process itself, as `kill` does: what it started has to notice by itself.
                os.kill(pid, int(command.get("signal", signal.SIGKILL)))
        if status is None:
            _, status = os.waitpid(pid, 0)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "output": output.read_text(errors="replace"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
