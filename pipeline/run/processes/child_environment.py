"""The environment of a process that a run starts beside itself: it is no rank of anything, and sees one GPU.

A process of torchrun hands its variables down to all that it starts. A child that makes a group of its own, as vLLM does,
then waits for a store that nobody serves; and a child that takes the first GPU takes that of another rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_OF_RANKS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
FOLLOWS = "TROPD_FOLLOWS_STARTER"
"""Set for a process that ends once the one that started it is gone."""
_OF_A_RANK = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", FOLLOWS})
VISIBLE = "CUDA_VISIBLE_DEVICES"


def is_rank() -> bool:
    """True in a process of torchrun, or of a launcher like it."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Number of this process among those of the machine, which is that of its GPU among the visible ones."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def child_environment(*, one_device: bool = True) -> dict[str, str]:
    """This process's environment without what makes it a rank.

    Args:
        one_device: the child sees this process's GPU only, as its first one; otherwise all that this process sees.
    """
    kept = {name: value for name, value in os.environ.items() if not _of_ranks(name)}
    return kept | (device_variables(local_rank()) if one_device else {})


def device_variables(number: int) -> dict[str, str]:
    """Variables for a child that sees a single GPU: the one with this number among those that this process sees."""
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return {VISIBLE: str(number)}
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return {VISIBLE: names[number % len(names)] if names else ""}


def become_child(environment: Mapping[str, str]) -> None:
    """Take on an environment in a process that multiprocessing has started, which inherits that of its parent.

    Call it before CUDA is used there.
    """
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _of_ranks(name: str) -> bool:
    return name in _OF_A_RANK or name.startswith(_OF_RANKS)
