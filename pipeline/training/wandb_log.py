"""Metrics to Weights & Biases, for those who want them there too: ``train.wandb_project``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tropd.storage.errors import ConfigError

Log = Callable[[Mapping[str, Any]], None]


def check_wandb(project: str | None) -> None:
    """Refuse before any work what could not be logged after it.

    Raises:
        ConfigError: a project is named and wandb is not installed.
    """
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            "train.wandb_project needs wandb, which is not installed",
            hint='pip install "tropd[wandb]", or leave the field out: metrics are in train/metrics.jsonl anyway',
        )


@contextmanager
def open_wandb(
    project: str | None, name: str, identity: str, config: Mapping[str, Any], folder: Path
) -> Iterator[Log]:
    """Log records while the block runs; does nothing without a project.

    Args:
        identity: a run that resumes under the same one goes on in the same curves.
        folder: where wandb keeps its own files.
    """
    if project is None:
        yield lambda record: None
        return
    import wandb

    run = wandb.init(
        project=project, name=name, id=identity, resume="allow", config=dict(config), dir=str(folder)
    )

    def log(record: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        run.log(numbers, step=record["step"])

    code = 1
    try:
        yield log
        code = 0
    finally:
        run.finish(exit_code=code)
