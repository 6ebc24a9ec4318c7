"""Digests of what a run has made: equal for equal runs on one machine, whatever the version of tropd.

    python tests/digests.py WORKSPACE > before.txt
    python tests/digests.py WORKSPACE --against before.txt

Prefixes, scores, checkpoints, weights, answers and metrics count, to the last bit; times, memory, logs and pages do not.
Nothing of tropd is imported, so that a change to it cannot hide what it has changed. Processors round differently:
between two machines the digests of anything a model has computed differ.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGES = ("data", "models", "prefixes", "rollouts", "rollout-scores", "scores", "train", "eval")
UNSTEADY = ("time_", "memory_", "mfu_", "exchange_seconds", "checksum")
"""Beginnings of names of metrics that differ between equal runs."""


def digest_lines(workspace: Path) -> Iterator[str]:
    """One line for each shard, manifest and line of metrics: its digest, and its path."""
    for stage in STAGES:
        folder = workspace / stage
        if not folder.is_dir():
            continue
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(workspace)
            if any(part.startswith(".") or part == "tensorboard" for part in name.parts):
                continue
            if path.name == "metrics.jsonl":
                yield from _metrics(path, str(name))
            else:
                yield f"{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}  {name}"


def _metrics(path: Path, name: str) -> Iterator[str]:
    for line in path.read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        kept = {key: value for key, value in record.items() if not key.startswith(UNSTEADY)}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
        yield f"{digest}  {name} step {record['step']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--against", type=Path, help="fail if the digests are not those of this file")
    options = parser.parse_args()
    lines = list(digest_lines(options.workspace))
    if not lines:
        parser.error(f"{options.workspace} holds no stage of a run")
    if options.against is None:
        print("\n".join(lines))
        return 0
    before = options.against.read_text().splitlines()
    changed = list(
        difflib.unified_diff(before, lines, str(options.against), str(options.workspace), "", "", 0, "")
    )
    print("\n".join(changed) if changed else f"the same: {len(lines)} digests")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
