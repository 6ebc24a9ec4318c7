"""Metrics to Weights & Biases as well, with ``train.wandb_project``."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError, DamagedShardError

IDENTITY = "wandb.json"

Log = Callable[[Mapping[str, Any]], None]


def check_wandb(project: str | None) -> None:
    """Fail early if wandb is requested but not installed.

    Raises:
        ConfigError: a project is named and wandb is not installed.
    """
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            "train.wandb_project needs wandb, which is not installed",
            hint='pip install "tropd[wandb]", or leave the field out: metrics are in train/metrics.jsonl anyway',
        )


def wandb_identity(folder: Path) -> str:
    """The id of the training run in a stage folder, drawn when it is first asked for and kept in ``wandb.json``.

    A run that resumes has the same one; one that is begun anew, or is in another workspace, has another.

    Raises:
        DamagedShardError: the file is not readable.
    """
    path = folder / IDENTITY
    if not path.exists():
        write_text_atomic(path, json.dumps({"id": secrets.token_hex(8)}) + "\n")
    try:
        identity = json.loads(path.read_bytes())["id"]
        if re.fullmatch(r"[0-9a-f]{16}", identity) is None:
            raise ValueError(f"{identity!r} is not an id")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedShardError(
            f"{path} does not hold the run's id at Weights & Biases: {error}",
            hint="put it back from a copy, or move it away: the run then continues there under a new id",
        ) from error
    return str(identity)


@contextmanager
def open_wandb(
    project: str | None, name: str, identity: str, config: Mapping[str, Any], folder: Path
) -> Iterator[Log]:
    """Log records while the block runs; does nothing without a project.

    Args:
        identity: a run that resumes under the same one continues the same curves.
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
