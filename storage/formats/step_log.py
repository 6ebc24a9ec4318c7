"""Records of training steps as JSON lines, each with a checksum of its own: damage to one costs no other.

A line ends with the first 16 digits of the SHA-256 of what it would be without them. Files of earlier versions have
no checksums; their lines count if they are records. A last line cut short by a kill is not damage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd.storage.disk.aside import keep_aside
from tropd.storage.disk.atomic import atomic_file
from tropd.storage.stage.manifest import Manifest, trained_steps
from tropd.storage.workspace import METRICS, SAMPLES

StepRecord = dict[str, Any]
SAMPLED_STEPS = 8
"""Number of steps of a run whose responses are kept."""
_SEALED = re.compile(rb'(.*), "checksum": "([0-9a-f]{16})"\}', re.DOTALL)
_SEAL = b'"checksum": "'


@dataclass(frozen=True)
class DamagedLine:
    """A line that is not a record, or not the one that was written."""

    number: int
    """Number of the line, from 1."""
    content: bytes
    torn: bool
    """The last line, without its end: a kill cut it short."""


@dataclass(frozen=True)
class StepLog:
    """The records of a file in the order of their steps, the last one of each step; and its damaged lines."""

    whole: list[StepRecord]
    damaged: list[DamagedLine]

    def missing(self, steps: Iterable[int]) -> list[int]:
        """Steps without a record, among the given ones."""
        there = {record["step"] for record in self.whole}
        return [step for step in steps if step not in there]


def sampled_steps(total: int) -> tuple[int, ...]:
    """The steps (from 0) whose responses are kept, of ``total``: first, last, and evenly between."""
    return spread_steps(total, SAMPLED_STEPS)


def steps_with_samples(manifest: Manifest) -> list[int]:
    """The finished steps of a training stage whose responses are kept."""
    planned, trained = manifest.fields.get("train.steps"), trained_steps(manifest)
    return [step for step in sampled_steps(planned) if step < trained] if isinstance(planned, int) else []


def spread_steps(total: int, most: int) -> tuple[int, ...]:
    """At most ``most`` of the numbers below ``total``, first and last among them, evenly."""
    if total <= most:
        return tuple(range(total))
    return tuple(round(i * (total - 1) / (most - 1)) for i in range(most))


def log_line(record: Mapping[str, Any]) -> str:
    """A record, which has a ``step``, as a line with its checksum."""
    plain = json.dumps(record)
    return f'{plain[:-1]}, "checksum": "{_checksum(plain.encode())}"}}\n'


def _checksum(plain: bytes) -> str:
    return hashlib.sha256(plain).hexdigest()[:16]


def read_log(path: Path) -> StepLog:
    """Read the whole records of a file; a missing file has none.

    Raises:
        OSError: the file cannot be read.
    """
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    sealed = any(_SEAL in line for line in [*lines, last])
    whole: dict[int, StepRecord] = {}
    damaged = []
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        record = _record(line, sealed)
        if record is None:
            damaged.append(DamagedLine(number, line, torn=number > len(lines)))
        else:
            whole[record["step"]] = record
    return StepLog([whole[step] for step in sorted(whole)], damaged)


def _record(line: bytes, sealed: bool) -> StepRecord | None:
    if sealed:
        found = _SEALED.fullmatch(line)
        if found is None or _checksum(line := found[1] + b"}") != found[2].decode():
            return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def resume_log(
    folder: Path, name: str, first_step: int, expected: Iterable[int]
) -> tuple[list[StepRecord], str]:
    """Resume a stage's file at a step: the records before it, and the losses in words (empty if nothing is lost).

    Later records are dropped, since their steps come again. Damaged lines are set aside (see ``aside``).

    Args:
        expected: the steps before ``first_step`` that have a record.

    Raises:
        DiskError: the file cannot be written.
    """
    path = folder / name
    found = read_log(path)
    kept = [record for record in found.whole if record["step"] < first_step]
    missing = found.missing(expected)
    damaged = [line for line in found.damaged if missing or not line.torn]
    said = []
    if damaged:
        aside = keep_aside(folder, name, b"".join(line.content + b"\n" for line in damaged))
        numbers = spans([line.number for line in damaged])
        said.append(f"line {numbers} of {path} is damaged, and set aside in {aside}")
    if missing:
        said.append(f"{path} has no record of step {spans(missing)}")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(map(log_line, kept)), encoding="utf-8")
    return kept, "; ".join(said)


def check_log(path: Path, expected: Iterable[int]) -> list[str]:
    """Problems of a file, in words: damaged lines, and steps without a record."""
    found = read_log(path)
    missing = found.missing(expected)
    damaged = [line.number for line in found.damaged if missing or not line.torn]
    return [
        *([f"line {spans(damaged)} is damaged"] if damaged else []),
        *([f"has no record of step {spans(missing)}"] if missing else []),
    ]


def log_problems(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Problems of a training stage's logs: name of the file, and the problem in words."""
    for name, steps in (
        (METRICS, range(trained_steps(manifest))),
        (SAMPLES, steps_with_samples(manifest)),
    ):
        for problem in check_log(folder / name, steps):
            yield name, problem


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as ``1 to 3, 7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in spans)
