"""The door between tropd and terminals or pipes: their encoding, text of models and files, and chatty libraries."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import warnings

SPELLED = "tropd.spelled"
"""Name of the error handler of output streams: it spells characters that their encoding lacks in ASCII."""
# A character and its spelling, each.
_PAIRS = """▁_ ▂. ▃- ▄: ▅= ▆+ ▇* █# →-> ←<- −- –- —- …... ·* •* ±+- ×x ≤<= ≥>= ≠!= ‖|| πpi “" ”" ‘' ’'"""
_SPELLING = {pair[0]: pair[1:] for pair in _PAIRS.split()} | {"\u00a0": " "}
# Controls other than newline and tab, and those that change the direction of text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""Text of models, data and paths as a terminal may have it: control characters are spelled (``\x1b``)."""
    return _CONTROLS.sub(lambda found: _escape(found.group()), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_SPELLING.get(one) or _escape(one) for one in missing), error.end


codecs.register_error(SPELLED, _spell)


def open_streams() -> None:
    """Let standard output and error write anything, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELLED)


def takes_unicode() -> bool:
    """True if standard output's encoding has all of Unicode."""
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith(("utf", "u8"))


def wants_debug() -> bool:
    """True if ``TROPD_DEBUG`` asks for tracebacks and debug logs."""
    return os.environ.get("TROPD_DEBUG", "").strip().lower() not in ("", "0", "false", "no", "off")


def quiet_libraries(debug: bool) -> None:
    """Send logs to standard error: everything with ``debug``, else tropd's warnings and errors of libraries.

    Processes that are started inherit it. Variables that the user has set stay.
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("tropd").setLevel(logging.DEBUG if debug else logging.WARNING)
    if debug:
        os.environ["TROPD_DEBUG"] = "1"
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("PYTHONWARNINGS", "ignore"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
