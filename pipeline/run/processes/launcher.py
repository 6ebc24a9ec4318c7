"""A rank ends with its launcher: a torchrun that is killed cannot tell its ranks to stop, and they would train on."""

from __future__ import annotations

import os
import threading
import time

SECONDS = 1.0


def end_with_launcher(seconds: float = SECONDS) -> None:
    """End this process, as a kill would, when the one that started it has ended; look every so many seconds."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
