"""Automatic settings, decided by the machine, the models, or the results that a workspace holds already.

They are decided where a run is opened, so that the stages see, and record, plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from tropd.pipeline.config.problems import Origins
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.config.sections.value_types import Dtype
from tropd.pipeline.models.model_files import weight_files
from tropd.pipeline.objectives.spec import Spec
from tropd.storage.errors import TropdError
from tropd.storage.stage.fingerprint import Scalar
from tropd.storage.stage.manifest import holds_output, read_manifest
from tropd.storage.workspace import STAGE_NAMES, Workspace

logger = logging.getLogger(__name__)

TINY_BYTES = 64_000_000
"""Models whose weights take less are tiny: one thread is fastest."""
FORMER_GRADER = "pattern"
"""The default grader until `math` took its place."""


def settled(workspace: Workspace, config: Config, origins: Origins) -> Config:
    """The configuration with precision and threads decided, and the grader that the workspace was begun with.

    Precision (``dtype = "auto"``) is that recorded by a stage of the workspace, so that results stay usable, also on
    another machine; else bfloat16 on CUDA and float32 on a CPU.
    """
    recorded = dict(_recorded(workspace))
    teachers = tuple(
        own.model_copy(update={"dtype": _dtype(own, f"teacher.{own.domain}", config, recorded)})
        for own in config.teacher.by_domain
    )
    teacher = {"dtype": _dtype(config.teacher, "teacher", config, recorded), "by_domain": teachers}
    student = {"dtype": _dtype(config.student, "student", config, recorded)}
    changes: dict[str, Spec] = {
        "teacher": config.teacher.model_copy(update=teacher),
        "student": config.student.model_copy(update=student),
    }
    if config.runtime.threads is None:
        changes["runtime"] = config.runtime.model_copy(update={"threads": _threads(workspace, config)})
    unset = origins.given(("evaluation", "grader")) is None
    if unset and recorded.get("evaluation.grader") == FORMER_GRADER:
        changes["evaluation"] = config.evaluation.model_copy(update={"grader": FORMER_GRADER})
    return config.model_copy(update=changes)


def _recorded(workspace: Workspace) -> Iterator[tuple[str, Scalar]]:
    """Fingerprint fields of the stages that hold results, the last stage first."""
    for name in reversed(STAGE_NAMES):
        folder = workspace.stage(name)
        try:
            manifest = read_manifest(folder)
        except (TropdError, OSError) as error:  # the stage itself will say so
            logger.debug("%s: %s", folder, error)
            continue
        if manifest is not None and holds_output(folder):
            yield from manifest.fields.items()


def _dtype(settings: ModelConfig, role: str, config: Config, recorded: dict[str, Scalar]) -> Dtype:
    if settings.dtype != "auto":
        return settings.dtype
    for name, value in recorded.items():
        if f".{name}".endswith(f".{role}.dtype") and value in ("float32", "bfloat16"):
            return "float32" if value == "float32" else "bfloat16"
    device = config.runtime.device
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    return "bfloat16" if on_gpu else "float32"


def _threads(workspace: Workspace, config: Config) -> int:
    """1 where all models are tiny; 0, which is PyTorch's choice, where one is not, or is not here yet."""
    if config.demo.enabled and config.demo.models == "tiny":
        return 1
    models: list[ModelConfig] = [config.student, config.teacher, *config.teacher.by_domain]
    return 1 if all(_is_tiny(workspace, settings) for settings in models) else 0


def _is_tiny(workspace: Workspace, settings: ModelConfig) -> bool:
    try:
        files = weight_files(workspace.resolve(settings.model))
        return sum(path.stat().st_size for path in files) < TINY_BYTES
    except (TropdError, OSError):
        return False
