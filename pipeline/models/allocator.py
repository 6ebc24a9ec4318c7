"""Main memory of a run on a CPU: memory that a step frees is kept for the next one.

By default glibc gives large free blocks back to the system, which hands them out again page by page, each zeroed at its
first touch. A step frees and asks for the same tensors over and over, which took a small model a tenth of its time.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT_BYTES = 2**30
"""Free memory at the end of the heap that is kept."""
LARGEST_BYTES = 2**25
"""Blocks from this size on go back at once, as ever: glibc's limit, and their own work outweighs it."""


def keep_freed_memory() -> None:
    """Set the thresholds of glibc, unless the user sets something there (``MALLOC_…``, ``GLIBC_TUNABLES``)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt(_MMAP_THRESHOLD, LARGEST_BYTES)
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_TOP_PAD, 2 * LARGEST_BYTES)
