"""Numbers and texts for people."""

from __future__ import annotations

import re

_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


def percent(share: float) -> str:
    """``0.402`` → ``40.2 %`` (with a space that does not break)."""
    return f"{100 * share:.1f}\u00a0%"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def count(number: float) -> str:
    return f"{number:,.0f}"


def human_bytes(number: float) -> str:
    """A size such as ``611 kB``: three digits, powers of 1000 (with a space that does not break)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f}\u00a0{unit}" if unit == "bytes" else f"{number:.3g}\u00a0{unit}"
        number /= 1000
    return f"{number:.3g}\u00a0TB"


def duration(seconds: float) -> str:
    """A time such as ``4.2 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"


def show_controls(text: str) -> str:
    """Text with control characters shown as symbols: models write them, and HTML does not allow them."""
    return re.sub(r"\r\n?", "\n", text).translate(_CONTROL)
