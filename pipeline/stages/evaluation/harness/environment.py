"""The environment of lighteval, which pins other versions of libraries than tropd, and calls of the driver in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tropd.pipeline.run.processes.child_environment import child_environment
from tropd.pipeline.stages.evaluation.lm_eval import ISOLATED
from tropd.storage.errors import ConfigError, TropdError

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
DRIVER = HERE / "driver.py"
MADE_BY = "make bench-harness"
VARIABLE = "TROPD_BENCH_HARNESS"
"""Names the environment's folder, where it is not the one that the Makefile makes."""
LOG_LINES = 15
FETCHING_SECONDS = 3600.0
"""Longest time for the questions of a benchmark, most of it downloading."""
GATED = re.compile(r"gated|401 Client Error|403 Client Error|DatasetNotFoundError", re.IGNORECASE)
UNREACHABLE = re.compile(
    r"offline|ConnectionError|ConnectError|Couldn't reach|MaxRetryError|name resolution", re.IGNORECASE
)


def environment_folder() -> Path:
    """The folder of the environment, which need not be there."""
    made = HERE.parents[3] / "build" / "bench-harness"
    return Path(os.environ.get(VARIABLE) or made)


def has_environment() -> bool:
    """True where the environment has been made."""
    return _python().is_file()


def require_environment(benchmark: str) -> None:
    """Refuse a benchmark whose harness is not installed.

    Raises:
        ConfigError: there is no environment.
    """
    if not has_environment():
        raise ConfigError(
            f"benchmark {benchmark!r} is judged by lighteval, in an environment of its own, and there is none in "
            f"{environment_folder()}",
            hint=f"{MADE_BY} makes it; elsewhere, install {REQUIREMENTS} into a virtual environment and name its folder "
            f"in {VARIABLE}",
        )


def call_driver(
    benchmark: str,
    arguments: Sequence[str],
    *,
    seconds: float,
    log: Path,
    isolated: bool = False,
    variables: Mapping[str, str] = {},
) -> None:
    """Run the driver in the environment; its output goes to ``log``.

    Args:
        seconds: time after which it and all that it has started are killed.
        isolated: without network, in a namespace of its own.
        variables: of its environment, besides those of this process.

    Raises:
        ConfigError: no environment; or a dataset that is gated or out of reach.
        TropdError: it failed or took too long; the end of its output is in the message.
    """
    require_environment(benchmark)
    # -I: nothing of this process's Python is seen there.
    command = [*(ISOLATED if isolated else ()), str(_python()), "-I", str(DRIVER), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**child_environment(one_device=False), **variables},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    told = "\n".join(f"    {line}" for line in lines)
    if code is None:
        raise TropdError(
            f"lighteval did not end within {seconds:,.0f} s on {benchmark}:\n{told}",
            hint=f"the full output is in {log}; responses are kept, so that judging alone begins anew "
            "(evaluation.judging_seconds)",
        )
    if GATED.search(told):
        raise ConfigError(
            f"the dataset of {benchmark} is not open to this account:\n{told}",
            hint="accept its terms on the Hugging Face hub and set HF_TOKEN to a token of that account",
        )
    if UNREACHABLE.search(told):
        raise ConfigError(
            f"{benchmark} needs a download that cannot be reached:\n{told}",
            hint="run tropd fetch where there is network, and copy the two files that it writes for the benchmark",
        )
    raise TropdError(f"lighteval failed on {benchmark}:\n{told}", hint=f"the full output is in {log}")


def _python() -> Path:
    return environment_folder() / "bin" / "python"
