"""Out-of-memory errors in words: the thing that did not fit, and the settings that make it smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tropd.storage.errors import MemoryFullError, TropdError

# PyTorch on a GPU and on a CPU, the system (also through Rust's libraries), C++.
_SIGNS = re.compile(
    r"out of memory|(?:can't|cannot) allocate memory|bad_alloc|can't start new thread", re.IGNORECASE
)
_THREADS = "can't start new thread"
_SAID = 200
"""Characters of the library's own words that are passed on."""


@contextmanager
def within_memory(what: str, smaller: str) -> Iterator[None]:
    """Name the block's work and the settings that shrink it, if memory ends in it; the innermost block speaks.

    Args:
        what: the work, as a subject: "the step's gradients".
        smaller: the settings to change, as a hint.

    Raises:
        MemoryFullError: in place of the libraries' errors, of main or GPU memory, or of threads.
    """
    try:
        yield
    except Exception as error:
        explained = memory_error(error, what, smaller)
        if explained is None:
            raise
        raise explained from error


def memory_error(error: BaseException, what: str, smaller: str) -> MemoryFullError | None:
    """The error in words, if it says that memory has ended; None otherwise."""
    words = " ".join(str(error).split())
    shortage = isinstance(error, MemoryError) or _SIGNS.search(words) is not None
    if isinstance(error, TropdError) or not shortage:
        return None
    if _THREADS in words:
        return MemoryFullError(
            f"{what}: the system starts no more threads",
            hint=f"raise its limit (ulimit -u, or that of the container), free memory, or {smaller}",
        )
    place = "the GPU's memory" if re.search("CUDA|HIP", words) else "main memory"
    said = f" ({words[:_SAID]})" if words else ""
    return MemoryFullError(f"{what}: does not fit into {place}{said}", hint=smaller)
