"""What training leaves: the student, or the batch that could not be trained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from tropd.pipeline.models import DTYPES, load_model
from tropd.pipeline.training.lora import merged_state
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.step import StepInputs
from tropd.storage.atomic import atomic_directory, write_text_atomic
from tropd.storage.errors import TropdError
from tropd.storage.stage import Stage

FINAL = "final"


def export_student(session: Session, stage: Stage) -> None:
    """The final student as a plain Hugging Face directory, in the configured precision."""
    with atomic_directory(stage.folder / FINAL) as folder:
        settings, model = session.run.config.student, session.whole_model
        if settings.lora is not None:
            state = merged_state(model)
            model = load_model(
                session.student.folder,
                dtype="float32",
                device=torch.device("cpu"),
                trust_remote_code=settings.trust_remote_code,
            )
            model.load_state_dict(state)
        model.to(DTYPES[settings.dtype]).save_pretrained(folder)
        session.student.tokenizer.save_pretrained(folder)
    stage.commit(FINAL, rows=session.run.config.train.steps)


def stopped(stage: Stage | None, step: int, inputs: StepInputs, error: Exception) -> TropdError:
    """Save the batch of a non-finite step and say where it is. The last checkpoint stays as it is."""
    if stage is None:
        return TropdError(f"step {step}: {error}")
    path = stage.folder / f"non-finite-step-{step:06d}.json"
    content: dict[str, Any] = {
        "step": step,
        "reason": str(error),
        "rows": [asdict(row) for row in inputs.rows],
        "teacher_logprobs": inputs.teacher.logprobs.tolist(),
    }
    write_text_atomic(path, json.dumps(content))
    return TropdError(
        f"step {step}: {error}. The step's batch is in {path}; the weights of the last checkpoint are untouched",
        hint="look at the batch; a lower train.learning_rate or teacher.dtype = 'float32' often helps",
    )
