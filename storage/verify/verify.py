"""Checking everything a workspace has stored, and setting damaged shards aside.

``verify_workspace`` reads every shard that a manifest names: checksum, row count, and the invariants inside
(``checks.py``). Files that no manifest names are left alone and mentioned. ``repair`` moves damaged shards to
``damaged/<stage>/`` and strikes them from the manifest, so that rerunning the stage makes them again; it never
deletes anything.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tropd.storage.catalog import DISTANCE, DISTANCES, EVALUATIONS, RESPONSES
from tropd.storage.disk.aside import set_aside
from tropd.storage.disk.atomic import TEMPORARY_PREFIX
from tropd.storage.errors import TropdError
from tropd.storage.formats.step_log import log_problems
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import (
    CHECKPOINTS,
    FILE_NAME,
    Manifest,
    Shard,
    can_go_on,
    check_shard,
    holds_output,
    read_manifest,
)
from tropd.storage.stage.stage import drop_shards, lock_stage
from tropd.storage.verify.checks import (
    belongs_to,
    check_rows,
    check_score_rows,
    check_scores,
    check_trajectories,
)
from tropd.storage.workspace import (
    METRICS,
    SAMPLES,
    STAGE_NAMES,
    STAGES,
    TRAJECTORIES,
    StageKind,
    Workspace,
    stage_kind,
)

# People edit these files; stages made from them identify them by their content.
PROBLEMS = "data"
TRAIN = "train"


@dataclass(frozen=True)
class Finding:
    """One fault. ``shard`` is set if setting that shard aside repairs it."""

    severity: Literal["error", "note"]
    stage: str
    path: str
    """Relative to the workspace."""
    problem: str
    shard: str | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.problem}"


def verify_workspace(workspace: Workspace, stages: Collection[str] = STAGE_NAMES) -> list[Finding]:
    """Check the stages; errors first within a stage, in manifest order.

    Raises:
        ConfigError: one of them is not a stage; the message lists all stages.
    """
    for name in stages:
        stage_kind(name)
    findings: list[Finding] = []
    manifests: dict[str, Manifest | None] = {}
    for kind in (kind for kind in STAGES if kind.name in stages):
        stage = kind.name
        folder = workspace.stage(stage)
        try:
            manifests[stage] = read_manifest(folder)
        except TropdError as error:
            manifests[stage] = None
            findings.append(Finding("error", stage, f"{stage}/{FILE_NAME}", str(error)))
            continue
        manifest = manifests[stage]
        if manifest is not None:
            findings += _verify_stage(workspace, stage, manifest, manifests.get(kind.scores_of or ""))
        elif _is_made(workspace, kind) and holds_output(folder):
            problem = "is missing, and without it nothing is known of the files beside it"
            findings.append(Finding("error", stage, f"{stage}/{FILE_NAME}", problem))
            continue
        if manifest is not None or not kind.brought:
            findings += _foreign(folder, stage, manifest)
    return findings


def _is_made(workspace: Workspace, kind: StageKind) -> bool:
    """True if only tropd writes into a stage's folder: models and data may be the user's own."""
    if not kind.brought:
        return kind.name != "report"
    return any((workspace.stage(other.name) / FILE_NAME).exists() for other in STAGES if other.brought)


def _verify_stage(
    workspace: Workspace, stage: str, manifest: Manifest, source: Manifest | None
) -> Iterator[Finding]:
    folder = workspace.stage(stage)
    if Fingerprint(manifest.fields).digest != manifest.fingerprint:
        yield Finding("error", stage, f"{stage}/{FILE_NAME}", "its fields do not have its fingerprint")
    if source is not None and not belongs_to(manifest, source):
        problem = f"was made from other trajectories than the ones in {source.stage}/"
        yield Finding("error", stage, stage, problem)
    seen: dict[tuple[str, int], str] = {}
    for shard in manifest.shards.values():
        try:
            check_shard(folder, shard)
            problems = _inside(workspace, stage, manifest, shard, seen, source)
        except TropdError as error:
            if _gone_meanwhile(folder, shard):
                continue
            problems = [error.message.replace(f"{folder / shard.name} ", "")]
        for problem in problems:
            if stage == PROBLEMS:
                yield Finding("note", stage, f"{stage}/{shard.name}", f"{problem}: edited or damaged")
            else:
                yield Finding("error", stage, f"{stage}/{shard.name}", problem, shard.name)
    if stage == TRAIN:
        for name, problem in log_problems(folder, manifest):
            yield Finding("error", stage, f"{stage}/{name}", problem)


def _inside(
    workspace: Workspace,
    stage: str,
    manifest: Manifest,
    shard: Shard,
    seen: dict[tuple[str, int], str],
    source: Manifest | None,
) -> list[str]:
    path = workspace.stage(stage) / shard.name
    if stage in TRAJECTORIES and path.suffix == ".parquet":
        return check_trajectories(path, shard, seen)
    if stage == "eval" and path.suffix == ".parquet":
        if path.name.startswith(RESPONSES):
            return check_trajectories(path, shard, {})
        return check_rows(path, shard, DISTANCES if path.name.startswith(DISTANCE) else EVALUATIONS)
    if stage_kind(stage).scores_of is not None:
        scored = _scored_shard(workspace, manifest, shard, source)
        if path.suffix == ".zarr":
            return check_scores(path, shard, manifest.fields, scored)
        if path.suffix == ".parquet":
            return check_score_rows(path, shard, scored)
    return []


def _scored_shard(
    workspace: Workspace, scores: Manifest, shard: Shard, source: Manifest | None
) -> Path | None:
    """The trajectory shard with the same number, if it is sound and the stages belong together."""
    name = Path(shard.name).with_suffix(".parquet").name
    if source is None or not belongs_to(scores, source) or name not in source.shards:
        return None
    folder = workspace.stage(source.stage)
    try:
        check_shard(folder, source.shards[name])
    except TropdError:
        return None  # reported with its own stage
    return folder / name


def _gone_meanwhile(folder: Path, shard: Shard) -> bool:
    """A running stage may retire a checkpoint while it is being checked."""
    try:
        manifest = read_manifest(folder)
    except TropdError:
        return False
    return manifest is None or manifest.shards.get(shard.name) != shard


def _foreign(folder: Path, stage: str, manifest: Manifest | None) -> Iterator[Finding]:
    """Files in a stage folder that neither its manifest nor its stage knows. Temporaries are gc's business."""
    if not folder.is_dir():
        return
    listed = set(manifest.shards) if manifest else set()
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        folders[:] = sorted(n for n in folders if not _known(stage, (inside / n).as_posix(), listed))
        for name in sorted(files):
            path = (inside / name).as_posix()
            if path != FILE_NAME and not _known(stage, path, listed):
                yield Finding("note", stage, f"{stage}/{path}", "no manifest names it; it is ignored")


def _known(stage: str, path: str, listed: set[str]) -> bool:
    return (
        path in listed
        or Path(path).name.startswith(TEMPORARY_PREFIX)
        or any(fnmatch.fnmatch(path, pattern) for pattern in stage_kind(stage).companions)
    )


_RESTORE = "put it back from a copy, or start the stage over with --force (the old output is moved aside)"
_LINES = (
    "tropd train sets damaged lines aside and resumes without them; a step that is gone can only be put back"
)
_ADVICE = {f"{TRAIN}/{METRICS}": _LINES, f"{TRAIN}/{SAMPLES}": _LINES}


def repair(workspace: Workspace, findings: Sequence[Finding]) -> list[str]:
    """Set aside every damaged shard; returns a line for each repair, and for each that was impossible.

    Raises:
        StageLockedError: a stage is running.
        DiskError: a file cannot be moved.
    """
    lines = [
        f"{f.path}: cannot be repaired here; {_ADVICE.get(f.path, _RESTORE)}"
        for f in findings
        if f.severity == "error" and f.shard is None
    ]
    by_stage: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "error" and finding.shard is not None:
            names = by_stage.setdefault(finding.stage, [])
            if finding.shard not in names:
                names.append(finding.shard)
    for stage, names in by_stage.items():
        folder = workspace.stage(stage)
        with lock_stage(folder):
            manifest = read_manifest(folder)
            if manifest is None:
                continue
            if not can_go_on(manifest, names):
                kept = [name for name in names if name.startswith(f"{CHECKPOINTS}/")]
                lines += [
                    f"{stage}/{name}: left as it is, since no checkpoint is whole; {_RESTORE}"
                    for name in kept
                ]
                names = [name for name in names if name not in kept]
            drop_shards(folder, manifest, names)
            lines += [_set_aside(workspace, stage, name) for name in names]
    return lines


def _set_aside(workspace: Workspace, stage: str, name: str) -> str:
    moved = set_aside(workspace.stage(stage), name)
    how = "was missing" if moved is None else f"moved to {moved.relative_to(workspace.root)}"
    return f"{stage}/{name}: {how}; rerun the stage to make it again"
