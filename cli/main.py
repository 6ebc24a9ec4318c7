"""Entry point of ``tropd``: the application, and how failures become messages and exit codes."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

# Waiting OpenMP threads spin by default, which slows tiny models tenfold on a busy machine. This must be set
# before PyTorch is loaded; a user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of libraries between ours

import typer

from tropd.cli.commands import (
    cache,
    comparing,
    data,
    inspection,
    planning,
    reproduction,
    shipping,
    stages,
    starting,
)
from tropd.cli.render import announce_start, tell
from tropd.cli.terminal import open_streams, quiet_libraries, wants_debug
from tropd.pipeline.models.memory import memory_error
from tropd.pipeline.run.processes.child_environment import is_rank
from tropd.pipeline.run.processes.together import follow_starter
from tropd.storage.errors import InterruptedStageError, TropdError

app = typer.Typer(
    name="tropd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Trust Region On-Policy Distillation: distill a large language model into a small one.\n\n"
    "Stages, each resumable on its own: init → prepare (demo) → generate-prefixes → score-teacher → train → "
    "evaluate → report. `tropd run` does those of a workspace in order, `tropd demo` all of them on two tiny models.",
)
INTERRUPTED = 130
INTERRUPTED_MESSAGE = "interrupted; run the same command again to resume"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tropd {version('tropd')}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug logs."),
    _version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_show_version, is_eager=True
    ),
) -> None:
    quiet_libraries(debug or wants_debug())


starting.register(app)
stages.register(app)
comparing.register(app)
inspection.register(app)
planning.register(app)
cache.register(app)
data.register(app)
reproduction.register(app)
shipping.register(app)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 usage or configuration, 130 interrupted."""
    open_streams()
    announce_start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    follow_starter()
    try:
        code = app(standalone_mode=False)  # newer typer turns KeyboardInterrupt into this code by itself
        if code == INTERRUPTED:
            tell(INTERRUPTED_MESSAGE)
    except (typer.Abort, KeyboardInterrupt):
        tell(INTERRUPTED_MESSAGE)
        code = INTERRUPTED
    except TropdError as error:
        if wants_debug():
            raise
        code = _refused(error)
    except BrokenPipeError:
        code = 0
    except Exception as error:
        # A usage error, of click or typer's copy of it.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        if wants_debug():
            raise
        # Some libraries turn a KeyboardInterrupt during their import into an error of theirs.
        if _interruptions:
            tell(INTERRUPTED_MESSAGE)
            sys.exit(INTERRUPTED)
        explained = memory_error(error, "tropd", "tropd plan shows a run's needs, and how to reduce them")
        if explained is not None:
            sys.exit(_refused(explained))
        tell(f"{type(error).__name__}: {error}", label="internal error: ", style="red")
        tell("  → tropd --debug … shows the traceback")
        code = 1
    _leave(code if isinstance(code, int) else 0)


def _refused(error: TropdError) -> int:
    stopped = isinstance(error, InterruptedStageError)  # as asked
    tell(error.message, label="" if stopped else "error: ", style="yellow" if stopped else "red")
    if error.hint:
        tell(f"  → {error.hint}")
    return error.exit_code


def _leave(code: int) -> NoReturn:
    """End with this exit code.

    In a rank, Python's own cleanup runs, but not that of the native libraries: it races with the threads of
    torch.distributed, and now and then a finished run would end with SIGABRT.
    """
    if is_rank():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_interruptions: list[int] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interruptions.append(number)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
