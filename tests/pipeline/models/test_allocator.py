"""Memory that a step frees serves the next one; each case in a process of its own, since the setting is global."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Steps of twelve tensors of 16 MB each; prints the pages that the system had to hand out in the later ones.
CODE = """
import resource, sys, torch
from tropd.pipeline.models.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    tensors = [torch.ones(4_000_000) for _ in range(12)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
first = step()
for _ in range(4):
    last = step()
print(last - first)
"""
PAGES = 4 * 12 * 16_000_000 // 4096


def faults(*arguments: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=plain | environment | {"OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="needs glibc",
)
@pytest.mark.slowest
def test_later_steps_get_what_earlier_ones_freed() -> None:
    by_default = faults("leave")
    if (
        by_default < PAGES / 10
    ):  # the system hands out huge pages: there is nothing to save, and nothing is lost
        assert faults("keep") < PAGES / 10
        return
    assert faults("keep") < by_default / 4
    # Who sets it has it their way.
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > by_default / 2
