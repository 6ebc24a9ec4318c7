"""``sft``: make a student by supervised fine-tuning on the teacher's trajectories, before it learns on its own.

The run's prefixes are the training data; a workspace ``W/sft`` of its own, whose inputs are links to W's, is trained with
the objective ``sft`` and the settings of ``[sft]``. ``student.model`` of W then names its last student,
``sft/train/final``.
"""

from __future__ import annotations

from dataclasses import replace

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.resolve import dump_config, parse_config
from tropd.pipeline.experiments.compare import link_shared
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import with_template_date
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.training.on_gpus import train_on
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.stage.manifest import Manifest
from tropd.storage.workspace import Workspace

FOLDER = "sft"
RESULT = "sft/train/final"


def sft(run: Run, base: str, *, gpus: int = 1, force: bool = False) -> Manifest:
    """Train ``base`` (a model directory or hub name) on the prefixes; returns the training's manifest.

    Raises:
        TropdError: the prefixes are not finished, or training fails.
    """
    finished(run, "prefixes")
    run = with_template_date(run)
    workspace = Workspace.create(run.workspace.root / FOLDER)
    link_shared(run.workspace, workspace)
    config, settings = run.config, run.config.sft
    steps = settings.steps
    plain = config.model_copy(
        update={
            "objective": load_objective("sft", {}),
            "student": config.student.model_copy(update={"model": base}),
            "rollout": config.rollout.model_copy(
                update={"prompts_per_step": settings.prompts_per_step, "samples_per_prompt": 1}
            ),
            "train": config.train.model_copy(
                update={
                    "steps": steps,
                    "learning_rate": settings.learning_rate,
                    "weight_decay": settings.weight_decay,
                    "warmup_steps": int(settings.warmup_fraction * steps),
                    "schedule": "cosine",
                    "evaluate_every": 0,
                }
            ),
        }
    )
    write_text_atomic(workspace.config_path, dump_config(plain))
    resolved = parse_config(dump_config(plain), where=str(workspace.config_path))
    return train_on(replace(run, workspace=workspace, resolved=resolved, assignments=()), gpus, force=force)
