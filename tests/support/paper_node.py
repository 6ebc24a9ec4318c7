"""The run of the paper's table 3 as numbers: sizes of its models, its configuration, a node of eight H100."""

from __future__ import annotations

from typing import Any

from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.machine import Gpu, Machine
from tropd.pipeline.training.preflight.needs import Needs

STUDENT = ModelShape(1_777_088_000, 28, 1536, 8960, 12, 2, 128, 151_936)
TEACHER = ModelShape(7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064)
H100 = Gpu("H100", 80e9, 79.5e9)
NODE = Machine(gpus=(H100,) * 8, memory=1e12, shared_memory=64e9, disk=2e12)


def paper_needs(gpus: int, *assignments: str, **changes: Any) -> Needs:
    """A row of the table on so many GPUs: plain on-policy distillation unless another objective is assigned."""
    settings = ['runtime.device="cuda"', "objective.name=opd", *assignments]
    config = parse_config(recipe_text("r1-distill-1.5b-math"), settings).config
    return Needs(config, gpus, STUDENT, TEACHER, **changes)
