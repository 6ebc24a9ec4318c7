"""The work of a stage in shards: the records that its planner, its makers and its workers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tropd.pipeline.run.run import Run


@dataclass(frozen=True)
class ShardSpec:
    """One shard to make."""

    number: int
    outputs: tuple[str, ...]
    """Names in the stage folder, in the order in which they are committed."""
    size: int
    """Units of the progress bar."""


class Maker(Protocol):
    """Makes shards; it holds their shared resources, such as an engine."""

    def __call__(self, number: int, folder: Path, advance: Callable[[int], None]) -> dict[str, int]:
        """Write the outputs of a shard into ``folder``; returns their row counts by name.

        ``advance`` is called with the number of further units done; over a shard they add up to its size.
        """


Opener = Callable[[Run], Maker]
"""Loads the resources of a maker. It must be picklable, for it may run in another process."""


@dataclass(frozen=True)
class Work:
    """The work of a stage: its shards, and how to make them."""

    title: str
    unit: str
    shards: Sequence[ShardSpec]
    open_maker: Opener
