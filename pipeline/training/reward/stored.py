"""Rewards that exist already: of stored rollouts, in a field of their own ``meta`` or in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from tropd.pipeline.training.reward.function import Missing, Value
from tropd.storage.errors import DataError
from tropd.storage.formats.record_fields import value_at
from tropd.storage.formats.records import read_records, record_unit
from tropd.storage.formats.trajectory_store import TrajectoryStore

Name = tuple[str, int]
"""Prompt id and sample index of a rollout."""


def stored_rewards(store: TrajectoryStore, field: str, file: Path | None) -> Callable[[int], Value | Missing]:
    """The reward of each rollout by its row in the store.

    Raises:
        DataError: the file is missing, or a record of it cannot be used.
    """
    if file is None:
        return lambda row: reward_of_text(store.meta(row).get(field), field)
    rewards = read_rewards(file, field)
    return lambda row: rewards.get(
        store.name(row), Missing(f"{file} has no record for sample {store.name(row)[1]} of its prompt")
    )


def check_stored(store: TrajectoryStore, reward_of: Callable[[int], Value | Missing]) -> None:
    """Refuse stored rollouts that have no reward, before any is trained on.

    Raises:
        DataError: naming the first of them.
    """
    values = {row: reward_of(row) for row in range(len(store))}
    without = [(row, value.reason) for row, value in values.items() if isinstance(value, Missing)]
    if without:
        (prompt, sample), reason = store.name(without[0][0]), without[0][1]
        raise DataError(
            f"{len(without)} of {len(store)} stored rollouts have no reward; the first is sample {sample} of prompt "
            f"{prompt!r}: {reason}",
            hint='add the rewards, or leave these rows out of each step with reward.missing = "drop"',
        )


def read_rewards(file: Path, field: str) -> dict[Name, Value | Missing]:
    """The rewards in a file of records with ``prompt_id``, ``sample_index`` and ``field``.

    Raises:
        DataError: naming file and record: it is bad, lacks a field, or names a rollout that another one has named.
    """
    if not file.is_file():
        raise DataError(f"reward.file = {str(file)!r} does not exist")
    found: dict[Name, Value | Missing] = {}
    for record in read_records(file):
        where = f"{file} {record_unit(file)} {record.number}"
        if record.fields is None:
            raise DataError(f"{where}: {record.problem}")
        name = _name(record.fields, where)
        if name in found:
            raise DataError(f"{where}: sample {name[1]} of prompt {name[0]!r} has a reward already")
        found[name] = number_or_numbers(_plain(value_at(record.fields, field)), field, where)
    return found


def reward_of_text(text: str | None, field: str) -> Value | Missing:
    """A reward from its text in ``meta``: a number, or a JSON list of numbers and nulls."""
    where = "its stored rollout"
    if text is None:
        return Missing(f"{where} has no field {field!r} in meta")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return number_or_numbers(value, field, where)


def number_or_numbers(value: Any, field: str, where: str) -> Value | Missing:
    """A number, a list of numbers and nulls, or the reason why it is neither."""
    items = value if isinstance(value, list) else [value]
    if value is None:
        return Missing(f"{where} has nothing in field {field!r}")
    if all(one is None or (isinstance(one, int | float) and not isinstance(one, bool)) for one in items):
        try:
            return [one if one is None else float(one) for one in items] if value is items else float(value)
        except OverflowError:
            return Missing(f"{where} has a number in field {field!r} that is too large for a float")
    return Missing(f"{where} has {str(value)[:80]!r} in field {field!r}, not a number")


def _name(fields: Mapping[str, Any], where: str) -> Name:
    prompt, sample = fields.get("prompt_id"), fields.get("sample_index")
    if prompt is None or isinstance(sample, bool) or not str(sample).isdecimal():
        raise DataError(
            f"{where}: it needs prompt_id and sample_index, a whole number (they are {prompt!r} and {sample!r})",
            hint="both are columns of rollouts/part-*.parquet: tropd query shows them",
        )
    return str(prompt), int(str(sample))


def _plain(value: Any) -> Any:
    """Fractions of JSON as float, lists of them too; numbers of CSV, which are text there."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
