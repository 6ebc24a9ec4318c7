"""TRL's side of ``bench_train.py``: ``trl_side.py FOLDER STEPS BATCH TOKENS HOW RATE`` in an environment of its own.

HOW is "defaults", or "float32" or "bfloat16", without the gradient checkpointing that is among TRL's defaults.
Prints one JSON object: seconds and generated tokens of each step, and seconds within generation and teacher.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step begins and ends."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.steps.append(time.perf_counter() - self.started)


def timed(owner: Any, name: str, spent: list[float]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - started)

    setattr(owner, name, wrapped)


def main(folder: Path, steps: int, batch: int, tokens: int, how: str, rate: float) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    prompts = json.loads((folder / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    frozen = torch.bfloat16 if how == "bfloat16" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=frozen)
    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_completion_length=tokens,
        beta=1.0,
        temperature=1.0,
        **({} if how == "defaults" else {"bf16": how == "bfloat16", "gradient_checkpointing": False}),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    clock, generating, teaching = Clock(), [], []
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    timed(trainer.model, "generate", generating)
    timed(trainer.teacher_model, "forward", teaching)
    trainer.train()
    lengths = [
        entry["completions/mean_length"]
        for entry in trainer.state.log_history
        if "completions/mean_length" in entry
    ]
    print(
        json.dumps(
            {
                "steps": clock.steps,
                "tokens": [length * batch for length in lengths],
                "generate": generating,
                "teacher": teaching,
                "bf16": config.bf16,
                "gradient_checkpointing": config.gradient_checkpointing,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5], float(sys.argv[6]))
