"""The numbers of a comparison: accuracy per method with intervals, paired differences, and the cost of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import BaseModel

from tropd.pipeline.report.comparison.comparison_distance import ReportedEstimate, distances_of
from tropd.pipeline.run.cells import FOLDER, REFERENCE, Cell
from tropd.pipeline.stages.evaluation.statistics import over_seeds
from tropd.storage.formats.step_log import read_log
from tropd.storage.seeds import derive_seed
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import METRICS, Workspace

MODES = ("greedy", "sampled")
BASELINE = "opd"
CURVES = (
    "distance_reverse_kl",
    "distance_forward_kl",
    "accuracy_greedy",
    "accuracy_sampled",
    "grad_norm",
    "k1_mean",
    "region_fraction_outlier",
    "student_entropy",
    "response_length_mean",
    "teacher_tokens_scored",
    "teacher_topk_tokens",
    "teacher_bytes_received",
)

Marks = npt.NDArray[np.float64]


class MethodResult(BaseModel):
    """One method over all its seeds."""

    objective: str
    seeds: list[int]
    accuracy: dict[str, ReportedEstimate]
    """Accuracy by mode; empty where no problem has an answer."""
    per_seed: dict[str, list[float]]
    difference: dict[str, ReportedEstimate]
    """Difference to the baseline: same seeds, same problems. Empty for the baseline itself."""
    steps: int
    tokens_on_policy: float
    """This and the next are means per run."""
    teacher_tokens_scored: float
    teacher_topk_tokens: float
    teacher_bytes_received: float
    seconds: float
    curves: dict[str, list[float | None]]
    """Mean over seeds per step."""
    distance: dict[str, ReportedEstimate] = {}
    """Distance to the teacher on held-out prompts, after training: reverse_kl, forward_kl, acceptance, length."""


class Comparison(BaseModel):
    """Result of ``tropd compare``."""

    workspace: str
    baseline: str
    problems: int
    before: dict[str, float]
    teacher: dict[str, float]
    methods: list[MethodResult]
    distance_before: dict[str, ReportedEstimate] = {}
    """Distance of the common start, the student before training."""


def collect_comparison(workspace: Workspace, cells: Sequence[Cell]) -> Comparison:
    """Read the results of all cells.

    Raises:
        FileNotFoundError: a cell was not evaluated.
    """
    by_objective: dict[str, list[Cell]] = {}
    for cell in cells:
        by_objective.setdefault(cell.objective, []).append(cell)
    marks = {
        name: {
            mode: np.stack([_marks(c.folder(workspace.root), "after", mode) for c in group]) for mode in MODES
        }
        for name, group in by_objective.items()
    }
    baseline = BASELINE if BASELINE in marks else next(iter(marks))
    reference = workspace.root / FOLDER / REFERENCE
    return Comparison(
        workspace=workspace.root.name,
        baseline=baseline,
        problems=marks[baseline]["greedy"].shape[1],
        before=_accuracies(reference, "before"),
        teacher=_accuracies(reference, "teacher"),
        methods=[_method(workspace, group, marks, baseline) for group in by_objective.values()],
        distance_before=distances_of([reference], "before", "before"),
    )


def _accuracies(folder: Path, who: str) -> dict[str, float]:
    """Accuracy by mode; none of a teacher that is not on this machine, nor where no problem has an answer."""
    if not (folder / "eval" / f"part-{who}.parquet").exists():
        return {}
    marks = {mode: _marks(folder, who, mode) for mode in MODES}
    return {mode: float(found.mean()) for mode, found in marks.items() if len(found)}


def _marks(folder: Path, who: str, mode: str) -> Marks:
    """``[problems]`` share of right responses per problem, in the order of the problems' names."""
    table = pq.read_table(folder / "eval" / f"part-{who}.parquet", columns=["mode", "prompt_id", "correct"])
    right: dict[str, list[bool]] = {}
    for row in table.to_pylist():
        if row["mode"] == mode:
            right.setdefault(row["prompt_id"], []).append(row["correct"])
    return np.array([np.mean(right[name]) for name in sorted(right)])


def _method(
    workspace: Workspace, cells: Sequence[Cell], marks: Mapping[str, Mapping[str, Marks]], baseline: str
) -> MethodResult:
    name = cells[0].objective
    own = marks[name]
    modes = [mode for mode in MODES if own[mode].size]
    records = [read_log(c.folder(workspace.root) / "train" / METRICS).whole for c in cells]
    totals = [_train_summary(c.folder(workspace.root)) for c in cells]

    def mean_total(field: str) -> float:
        return float(np.mean([t.get(field, 0) for t in totals]))

    return MethodResult(
        objective=name,
        seeds=[c.seed for c in cells],
        accuracy={mode: _over_seeds(own[mode], "bootstrap", name, mode) for mode in modes},
        per_seed={mode: own[mode].mean(axis=1).tolist() for mode in modes},
        difference={}
        if name == baseline
        else {
            mode: _over_seeds(own[mode] - marks[baseline][mode], "difference", name, mode) for mode in modes
        },
        distance=distances_of([c.folder(workspace.root) for c in cells], "after", name),
        steps=int(totals[0]["steps"]),
        tokens_on_policy=mean_total("tokens_on_policy"),
        teacher_tokens_scored=mean_total("teacher_tokens_scored"),
        teacher_topk_tokens=mean_total("teacher_topk_tokens"),
        teacher_bytes_received=mean_total("teacher_bytes_received"),
        seconds=float(np.mean([sum(r["time_total"] for r in rows) for rows in records])),
        curves={curve: _mean_curve([[r.get(curve) for r in rows] for rows in records]) for curve in CURVES},
    )


def _train_summary(folder: Path) -> dict[str, float]:
    manifest = read_manifest(folder / "train")
    return dict(manifest.summary) if manifest is not None else {}


def _mean_curve(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    curve: list[float | None] = []
    for values in zip(*rows, strict=True):
        known = [v for v in values if v is not None]
        curve.append(float(np.mean(known)) if known else None)
    return curve


def _over_seeds(values: Marks, *seed: str) -> ReportedEstimate:
    """Mean of ``[seeds, problems]``."""
    return ReportedEstimate.of(over_seeds(values, np.ones_like(values), seed=derive_seed(*seed)))
