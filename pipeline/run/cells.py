"""The runs of a comparison: one per objective and seed, each in its own workspace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = "compare"
REFERENCE = "reference"


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    ``objective`` is a method's name, or a variant of it: ``tropd:train.learning_rate=3e-4+objective.k=8``.
    """

    objective: str
    seed: int

    @property
    def name(self) -> str:
        return self.objective.partition(":")[0]

    @property
    def assignments(self) -> list[str]:
        """Overrides of the variant."""
        text = self.objective.partition(":")[2]
        return text.split("+") if text else []

    def folder(self, root: Path) -> Path:
        return root / FOLDER / re.sub(r"[^\w.=+-]", "_", self.objective) / f"seed-{self.seed}"
