"""Prompts that are kept for evaluation: chosen at random, and none of them in other words also trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tropd.pipeline.problems.prompts import Prompt
from tropd.storage.errors import DataError
from tropd.storage.formats.records import read_records
from tropd.storage.seeds import derive_seed


def split(prompts: Sequence[Prompt], num_held_out: int, seed: int, path: Path) -> tuple[list[int], list[int]]:
    """Records (by ``Prompt.line``) to train on and to evaluate on, both in random order.

    Prompts with the same text, but for case and spaces, stay together.

    Raises:
        DataError: all prompts are the same.
    """
    groups: dict[str, list[int]] = {}
    for prompt in prompts:
        groups.setdefault(_plainly(prompt), []).append(prompt.line)
    if len(groups) < 2:
        raise DataError(
            f"{path} has one prompt only, so none can be held out",
            hint="name a file of others with --evaluation",
        )
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "held-out")))
    shuffled = [list(groups.values())[int(i)] for i in generator.permutation(len(groups))]
    held = min(num_held_out, len(groups) - 1)
    # One of each: a repeated problem is no second piece of evidence.
    return [line for group in shuffled[held:] for line in group], [group[0] for group in shuffled[:held]]


def repeated(problems: Sequence[Prompt], prompts: Sequence[Prompt]) -> int:
    """Number of problems whose text, but for case and spaces, is a prompt's too."""
    texts = {_plainly(prompt) for prompt in prompts}
    return sum(_plainly(problem) in texts for problem in problems)


def _plainly(prompt: Prompt) -> str:
    return " ".join(prompt.text.casefold().split())


def record_lines(path: Path, numbers: Sequence[int]) -> str:
    """The records with these numbers as JSON lines in this order; those without an id get their number in the file."""
    wanted = set(numbers)
    found = {r.number: r.fields for r in read_records(path) if r.number in wanted and r.fields is not None}
    return "".join(f"{_line(found[number], number)}\n" for number in numbers)


def _line(fields: Mapping[str, Any], number: int) -> str:
    given = fields.get("id") is not None
    return json.dumps(fields if given else {**fields, "id": str(number)}, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Convert values that JSON has no form for: fractions to numbers, times to text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
