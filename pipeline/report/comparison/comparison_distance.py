"""Distances to the teacher of a comparison's runs: of each method over its seeds, and of the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel

from tropd.pipeline.stages.evaluation import statistics
from tropd.pipeline.stages.evaluation.statistics import over_seeds
from tropd.storage.catalog import DISTANCE
from tropd.storage.seeds import derive_seed

MEASURES = {
    "reverse_kl": "student_tokens",
    "forward_kl": "teacher_tokens",
    "acceptance": "student_tokens",
    "length": None,
}
"""Columns of distances, and those with the tokens that they are means over; lengths are means over responses."""


class ReportedEstimate(BaseModel):
    """A mean with its 95 % bootstrap interval over seeds and problems."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, found: statistics.Estimate) -> ReportedEstimate:
        return cls(mean=found.value, low=found.low, high=found.high)


def distances_of(folders: Sequence[Path], who: str, name: str) -> dict[str, ReportedEstimate]:
    """Distances by measure, over workspaces with different seeds; measures that some of them lack are left out.

    Args:
        name: of what is measured, for the seed of resampling.
    """
    paths = [folder / "eval" / f"{DISTANCE}{who}.parquet" for folder in folders]
    if not all(path.exists() for path in paths):  # made by a version that did not measure them
        return {}
    runs = [{row["prompt_id"]: row for row in pq.read_table(path).to_pylist()} for path in paths]
    prompts = sorted(set.intersection(*(set(run) for run in runs)))
    found: dict[str, ReportedEstimate] = {}
    for measure, count in MEASURES.items():
        value = "student_tokens" if count is None else measure
        values, tokens = (
            np.array(
                [[1.0 if column is None else run[p][column] for p in prompts] for run in runs], dtype=float
            )
            for column in (value, count)
        )
        if values.size and not np.isnan(values).any():
            seed = derive_seed("distance", name, measure)
            found[measure] = ReportedEstimate.of(over_seeds(values * tokens, tokens, seed=seed))
    return found
