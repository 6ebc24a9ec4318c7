"""Supervised training of the two tiny models. Small on purpose: a loop, a loss, a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tropd.pipeline.config.sections.evaluation_settings import DemoConfig
from tropd.pipeline.experiments.demo.task import Chain, Problem, draw_training_problem, write_chain
from tropd.pipeline.experiments.demo.tokenizer import EOS_ID, PAD_ID, encode_text, vocabulary

BATCH_SIZE = 32
BETAS = (0.9, 0.98)
WARMUP_STEPS = 20
PEAK_LEARNING_RATE = 3e-3
SPOIL_LEARNING_RATE = 1e-3
TEACHER_OPERATIONS = (3, 8)
TEACHER_NOISE = 0.13
STUDENT_NOISE = 0.1
TERSE_SHARE = 0.15

Step = Callable[[float], None]
"""Called after every optimizer step with the loss."""


@dataclass(frozen=True)
class Shape:
    """Size of a model."""

    layers: int
    hidden: int
    heads: int


TEACHER = Shape(layers=3, hidden=96, heads=3)
STUDENT = Shape(layers=2, hidden=64, heads=4)


def make_model(shape: Shape, seed: int) -> Any:
    """A randomly initialized Qwen3; the global random state is left as it was."""
    config = Qwen3Config(
        vocab_size=len(vocabulary()),
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


def train_teacher(config: DemoConfig, seed: int, on_step: Step) -> Any:
    """A teacher that is right, and stays right after a mistake that was not its own.

    It sees chains with injected errors, continues from the wrong value, and is not taught the errors themselves.
    A teacher of perfect chains only is lost on a student's mistakes, and every on-policy method fails with it.
    """
    generator = np.random.Generator(np.random.PCG64(seed))

    def example() -> tuple[Problem, Chain, bool]:
        problem = draw_training_problem(generator, *TEACHER_OPERATIONS)
        return problem, write_chain(problem, noise=TEACHER_NOISE, generator=generator), True

    model = make_model(TEACHER, seed)
    _train(model, example, config.teacher_steps, PEAK_LEARNING_RATE, on_step, decay=True)
    return model


def train_student(config: DemoConfig, seed: int, on_step: Step) -> Any:
    """A student that once had the skill, then was spoiled."""
    generator = np.random.Generator(np.random.PCG64(seed))
    low, high = config.min_operations, config.max_operations

    def clean() -> tuple[Problem, Chain, bool]:
        problem = draw_training_problem(generator, low, high)
        return problem, write_chain(problem), True

    def spoiled() -> tuple[Problem, Chain, bool]:
        problem = draw_training_problem(generator, low, high)
        if config.spoil == "terse" or generator.random() < TERSE_SHARE:
            return problem, write_chain(problem, terse=True), False
        return problem, write_chain(problem, noise=STUDENT_NOISE, generator=generator), False

    model = make_model(STUDENT, seed)
    _train(model, clean, config.student_steps, PEAK_LEARNING_RATE, on_step, decay=True)
    _train(model, spoiled, config.spoil_steps, SPOIL_LEARNING_RATE, on_step, decay=False)
    return model


def _train(
    model: Any,
    example: Callable[[], tuple[Problem, Chain, bool]],
    steps: int,
    learning_rate: float,
    on_step: Step,
    *,
    decay: bool,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(steps):
        scale = 0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale * min(1.0, (step + 1) / WARMUP_STEPS)
        ids, labels = padded_batch([example() for _ in range(BATCH_SIZE)])
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(float(loss.detach()))
    model.eval()


def padded_batch(examples: list[tuple[Problem, Chain, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels ``[B, W]``; labels are -100 on prompt, padding and (if asked) injected errors."""
    rows = [(encode_text(p.prompt), encode_text(c.text), c.injected, skip) for p, c, skip in examples]
    width = max(len(prompt) + len(text) + 1 for prompt, text, _, _ in rows)
    ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
    labels = np.full((len(rows), width), -100, dtype=np.int64)
    for row, (prompt, text, injected, skip) in enumerate(rows):
        response = [*text, EOS_ID]
        end = len(prompt) + len(response)
        ids[row, :end] = [*prompt, *response]
        labels[row, len(prompt) : end] = response
        if skip:
            labels[row, len(prompt) : end - 1][np.array(injected)] = -100
    return torch.from_numpy(ids), torch.from_numpy(labels)
