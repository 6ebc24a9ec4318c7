"""Reward functions as a user writes them, good and bad. Loaded in worker processes by name."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

print("imported")


def length(rows: Rows) -> list[float]:
    print("called with", len(rows))
    return [len(row["response"]) / 10 for row in rows]


def as_array(rows: Rows) -> Any:
    return np.arange(len(rows), dtype=np.float32)


def per_token(rows: Rows) -> list[list[float | None]]:
    return [[None, *[1.0] * (len(row["token_ids"]) - 1)] for row in rows]


def some(rows: Rows) -> list[float | None]:
    return [None if row["id"] == "b" else float("nan") if row["id"] == "c" else 1.0 for row in rows]


def environment(rows: Rows) -> list[float]:
    """The number of its GPU; 99 in a rank of torchrun."""
    rank = any(name.startswith(("TORCHELASTIC_", "MASTER_")) or name.endswith("RANK") for name in os.environ)
    return [99.0 if rank else float(os.environ["CUDA_VISIBLE_DEVICES"].replace(",", "."))] * len(rows)


def raises(rows: Rows) -> list[float]:
    raise KeyError("verdict")


def leaves(rows: Rows) -> list[float]:
    os._exit(3)


def quits(rows: Rows) -> list[float]:
    raise SystemExit("enough")


def hangs(rows: Rows) -> list[float]:
    if rows[0]["id"] == "b":
        time.sleep(600)
    return [1.0] * len(rows)


def too_few(rows: Rows) -> list[float]:
    return [1.0] * (len(rows) - 1)


def one_number(rows: Rows) -> Any:
    return 1.0


def too_large(rows: Rows) -> list[int]:
    return [10**400] * len(rows)


def words(rows: Rows) -> Any:
    return ["good"] * len(rows)


NOT_A_FUNCTION = 3
