"""The final model of a run: the trained student as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from tropd.pipeline.models.loading import load_model
from tropd.pipeline.models.runtime import DTYPES
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.update.lora import merged_state
from tropd.storage.disk.atomic import atomic_directory
from tropd.storage.stage.stage import Stage

FINAL = "final"


def export_student(session: Session, stage: Stage) -> None:
    """The final student as a plain Hugging Face directory, in the configured precision."""
    with atomic_directory(stage.folder / FINAL) as folder:
        settings, model = session.run.config.student, session.rolling.whole_model
        if settings.lora is not None:
            state = merged_state(model)
            model = load_model(
                session.student.folder,
                dtype="float32",
                device=torch.device("cpu"),
                trust_remote_code=settings.trust_remote_code,
            )
            model.load_state_dict(state)
        set_stops(model.generation_config, session.student.stop_ids)
        model.to(DTYPES[settings.settled_dtype]).save_pretrained(folder)
        session.student.tokenizer.save_pretrained(folder)
    stage.commit(FINAL, rows=session.run.config.train.steps)


def set_stops(generation: Any, stop_ids: Collection[int]) -> None:
    """Say in a generation configuration where responses end, so that any server of the model ends them there."""
    ends = sorted(stop_ids)
    before = generation.eos_token_id
    if sorted(before if isinstance(before, list) else [before]) != ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
