"""Inside a process that calls the user's reward function. Rows come and rewards go as JSON text."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tropd.pipeline.run.processes.child_environment import become_child

_function: Callable[[list[dict[str, Any]]], Any] | None = None
_problem = ""


def start(name: str, folders: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    """Take on an environment, and import the function ``module:name`` once, looking into ``folders`` first.

    What it prints goes to the file ``log``. A failure is kept for the first call to tell.
    """
    global _function, _problem
    become_child(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:0] = folders
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError(f"{name} is a {type(found).__name__}, not a function")
        _function = found
    except BaseException as error:
        _problem = _told(error)


def call(rows: str) -> str:
    """The rewards of a JSON list of rows: ``{"rewards": [...]}``, or ``{"problem": "..."}`` if there are none.

    An empty list calls nothing: it tells whether the function could be imported.
    """
    if _function is None:
        return json.dumps({"problem": f"it cannot be imported: {_problem}"})
    asked = json.loads(rows)
    if not asked:
        return json.dumps({"rewards": []})
    try:
        found = _plain(_function(asked))
        if not isinstance(found, list):
            raise TypeError(f"it returned a {type(found).__name__}, not a list of rewards")
        return json.dumps({"rewards": found})
    except BaseException as error:
        return json.dumps({"problem": _told(error)})


def _plain(value: Any) -> Any:
    """Numbers, None and lists of them; arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, float):
        return value
    with contextlib.suppress(AttributeError):
        return float(value.__float__())
    raise TypeError(
        f"it returned a {type(value).__name__} ({str(value)[:80]!r}), where a number or None is due"
    )


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__]
    where = f" ({own[-1].filename} line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _end_with_parent() -> None:
    """A trainer that is killed says nothing; its process object notices."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
