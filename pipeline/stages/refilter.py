"""Trajectories filtered anew: where only the filters have changed, nothing is sampled again.

Those that a filter leaves out are written beside the stage, to ``rejects/prefixes/<digest>/``, in a folder for each
way of sampling. With the kept ones they are all that was sampled, from which another filter takes its own. A stage whose
rejects are not there (older versions wrote none) is refused as for any other change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from tropd.pipeline.problems.grading.grading import grade
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.shard_work import Maker
from tropd.storage.disk.atomic import make_folder
from tropd.storage.errors import TropdError
from tropd.storage.formats.trajectories import Trajectory, read_trajectories, write_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, check_shard, read_manifest

FILTERS = frozenset(
    {"prefixes.keep", "evaluation.answer_pattern", "evaluation.grader", "evaluation.grading_rules"}
)
"""Fingerprint fields that decide which sampled trajectories are kept."""

Answered = tuple[Trajectory, str | None]
"""A trajectory, and the answer that its prompt expects."""


def rejects_folder(run: Run, identity: Fingerprint) -> Path:
    """The folder of the rejected trajectories, of those sampled as ``identity`` says."""
    sampling = Fingerprint({name: v for name, v in identity.fields.items() if name not in FILTERS})
    return run.workspace.root / "rejects" / "prefixes" / sampling.digest[:16]


def only_filters_changed(identity: Fingerprint, made: Manifest) -> list[str]:
    """Names of the fields that differ, if all of them are filters; none otherwise."""
    names = [name for name, _, _ in identity.changes_from(made.fields)]
    return names if FILTERS.issuperset(names) else []


def separate(run: Run, keep: str, rows: Sequence[Answered]) -> tuple[list[Trajectory], list[Trajectory]]:
    """Trajectories that are kept, and those that are not, each in order."""
    if keep == "all":
        return [row for row, _ in rows], []
    marks = grade(
        [row.text for row, _ in rows],
        [answer for _, answer in rows],
        run.config.evaluation,
        cut_off=[row.finish_reason == "length" for row, _ in rows],
    )
    kept = [row for (row, _), mark in zip(rows, marks, strict=True) if mark.correct]
    return kept, [row for (row, _), mark in zip(rows, marks, strict=True) if not mark.correct]


def write_left_out(folder: Path, name: str, rows: Sequence[Trajectory]) -> None:
    """Store the rejects of a shard, before the shard itself, so that one never exists without the other."""
    make_folder(folder)
    write_trajectories(folder / name, rows)


def is_whole(shards: Sequence[Path], rejects: Path, expected: Sequence[Collection[tuple[str, int]]]) -> bool:
    """True if shards and their rejects together are all trajectories that were sampled, each once.

    Args:
        expected: of each shard, prompt ids with sample numbers.
    """
    try:
        for shard, wanted in zip(shards, expected, strict=True):
            left_out = rejects / shard.name
            found = [*_keys(shard), *(_keys(left_out) if left_out.is_file() else [])]
            if len(found) != len(wanted) or set(found) != set(wanted):
                return False
    except (OSError, ValueError, KeyError):  # pyarrow's errors are among these
        return False
    return True


def _keys(path: Path) -> list[tuple[str, int]]:
    table = pq.read_table(path, columns=["prompt_id", "sample_index"])
    return list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))


def open_filter(
    stage: str, made: Manifest, rejects: Path, keep: str, batches: Sequence[Sequence[Prompt]], run: Run
) -> Maker:
    """Return a maker that filters one shard after another of the stage that was moved aside.

    Raises:
        TropdError: it is not there.
    """
    asides = sorted(run.workspace.root.glob(f"{stage}.old-*"))
    found = [folder for folder in asides if (old := read_manifest(folder)) and old == made]
    if not found:
        raise TropdError(f"the {stage} stage that was to be filtered no longer exists")
    names = sorted(made.shards)

    def make(number: int, folder: Path, advance: Callable[[int], None]) -> dict[str, int]:
        name, prompts = names[number], batches[number]
        check_shard(found[0], made.shards[name])
        rows = list(read_trajectories(found[0] / name))
        if (rejects / name).is_file():
            rows += read_trajectories(rejects / name)
        place = {prompt.id: index for index, prompt in enumerate(prompts)}
        rows.sort(key=lambda row: (place[row.prompt_id], row.sample_index))
        answered = [(row, prompts[place[row.prompt_id]].answer) for row in rows]
        kept, left_out = separate(run, keep, answered)
        write_left_out(rejects, name, left_out)
        advance(len(prompts))
        return {name: write_trajectories(folder / name, kept)}

    return make
