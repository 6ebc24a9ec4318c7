"""GPU-hours of the stages besides training, from the same rates; every response has full length."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from tropd.pipeline.config.sections.value_types import EngineName
from tropd.pipeline.training.memory_plan import ModelShape
from tropd.pipeline.training.preflight.needs import VLLM_BESIDE, Needs
from tropd.pipeline.training.preflight.step_time import (
    StepWork,
    decode_seconds,
    score_seconds,
    train_seconds,
)


def writing_hours(
    needs: Needs, shape: ModelShape, engine: EngineName, *, responses: int, length: int, batch_size: int
) -> float:
    """Of sampling so many responses, shared out over the GPUs."""
    share = needs.config.vllm.gpu_memory_utilization * needs.gpu_bytes
    room = max(1e9, share - 2 * shape.parameters - VLLM_BESIDE)
    layout = replace(needs.layout, student=engine, batch_size=batch_size, kv_room=room)
    work = StepWork(needs.prompt, (length,) * ceil(responses / needs.gpus))
    return decode_seconds(layout, work, shape, needs.rates)[0] * needs.gpus / 3600


def scoring_hours(needs: Needs, *, responses: int, length: int) -> float:
    """Of the teacher's scores of so many responses, alternatives included."""
    work = StepWork(needs.prompt, (length,) * responses, alternatives=True)
    return score_seconds(needs.layout, work, needs.teacher, needs.rates) / 3600


def sft_hours(needs: Needs) -> float:
    """Of supervised fine-tuning on the teacher's trajectories."""
    sft = needs.config.sft
    work = StepWork(needs.prompt, (needs.config.prefix_max_tokens,) * sft.prompts_per_step)
    return sft.steps * train_seconds(needs.layout, work, needs.student, needs.rates)[0] / 3600


def training_hours(needs: Needs) -> float:
    """Of all steps: the whole node's time, idle GPUs included."""
    return needs.step().gpu_hours(needs.config.train.steps, needs.layout.gpus)
