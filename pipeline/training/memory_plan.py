"""Memory and disk space of a training run, from the models' configurations alone.

Exact are parameters (the model is built without storage), gradients, AdamW's moments and the KV cache. Activations are
an estimate: autograd's memory per token of a decoder layer with fused attention, the inputs of its matrix products
and of its non-linear functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.scoring import LOGIT_ELEMENTS
from tropd.pipeline.models.loading import load_model_config, model_without_weights, num_parameters
from tropd.pipeline.models.output.logprobs import CHUNK_ELEMENTS
from tropd.pipeline.problems.encoding import encode_prompts, tokens_of
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.run.opening import role_room, role_tokenizer
from tropd.pipeline.run.run import Run

BYTES = {"float32": 4, "bfloat16": 2}
# The share that allocators and kernels take besides.
OVERHEAD = 0.1
LOOKED_AT = 2000
"""Prompts whose lengths are counted."""
LIBRARIES = 0.6e9
"""Main memory of a process that has loaded Python, PyTorch and transformers."""
CACHE_BYTES = 95
"""Per token of the teacher cache (docs/cache.md)."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @staticmethod
    def of(config: Any) -> ModelShape:
        """From a transformers configuration; the parameters are counted on a model without storage."""
        text = config.get_text_config()
        parameters = num_parameters(model_without_weights(config))
        heads = text.num_attention_heads
        return ModelShape(
            parameters=parameters,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab=text.vocab_size,
        )


@dataclass(frozen=True)
class MemoryPart:
    """Something that takes memory in each process, and the setting that makes it smaller."""

    name: str
    bytes: float
    smaller: str


def memory_parts(
    config: Config,
    student: ModelShape,
    teacher: ModelShape | None,
    processes: int,
    *,
    longest_prompt: int = 0,
) -> list[MemoryPart]:
    """Memory of each training process on its device, by purpose.

    Args:
        teacher: None where another device has it (``teacher.url``).
        processes: those that torchrun starts; weights, gradients and moments are shared out.
        longest_prompt: in tokens, where it is known.
    """
    compute = BYTES[config.student.settled_dtype]
    on_cpu = _on_cpu(config)
    cached = BYTES["float32"] if on_cpu else compute  # see lean_decoder
    adapters = config.student.lora
    trained = trained_parameters(config, student)
    # Frozen weights of a single process keep their own precision; sharded ones are float32.
    width = compute if adapters is not None and processes == 1 else BYTES["float32"]
    frozen = student.parameters if adapters is not None else 0
    share = trained / processes
    longest = longest_prompt + config.rollout.max_tokens
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    tokens = min(max(config.train.micro_batch_tokens, longest), rows * longest)
    scored = min(max(config.service.batch_tokens, longest), rows * longest)
    parts = [
        *([MemoryPart("frozen weights", width * frozen / processes, "student.dtype")] if frozen else []),
        MemoryPart("weights, float32" if not frozen else "adapters", 4 * share, "more processes"),
        MemoryPart("gradients", 4 * share, "more processes"),
        MemoryPart("AdamW's moments", 8 * share, "more processes"),
        MemoryPart(
            "activations of a micro-batch",
            tokens * activation_bytes(student, compute, config.train.gradient_checkpointing),
            "train.micro_batch_tokens, train.gradient_checkpointing = true",
        ),
        MemoryPart("log-probs: a chunk of logits", 3.0 * 4 * min(CHUNK_ELEMENTS, tokens * student.vocab), ""),
        MemoryPart("log-probs: the head's gradient", 4.0 * student.vocab * student.hidden, ""),
        MemoryPart(
            "KV cache of rollouts",
            min(config.rollout.batch_size, rows) * longest * kv_bytes_per_token(student, cached),
            "rollout.batch_size, rollout.max_tokens",
        ),
    ]
    if on_cpu:
        processes_here = 1 if teacher is None else 2
        parts.append(MemoryPart("programs and libraries", LIBRARIES * processes_here, ""))
    if on_cpu and config.student.engine == "transformers":
        parts.append(MemoryPart("weights arranged for sampling", compute * student.parameters, ""))
    if config.train.max_staleness and config.student.engine == "transformers":
        whole = BYTES["float32"] if processes == 1 and config.student.lora is None else compute
        parts.append(
            MemoryPart("student that samples", whole * student.parameters, "train.max_staleness = 0")
        )
    elif processes > 1:
        parts.append(MemoryPart("whole student for rollouts", compute * student.parameters, ""))
    if teacher is not None:
        size = BYTES[config.teacher.settled_dtype]
        parts.append(MemoryPart("teacher", size * teacher.parameters, "teacher.url on another GPU"))
        logits = min(LOGIT_ELEMENTS, scored * teacher.vocab)
        scoring = 3.0 * 4 * logits + scored * size * 4 * (teacher.hidden + teacher.intermediate)
        parts.append(MemoryPart("teacher: a scoring pass", scoring, "service.batch_tokens"))
    total = sum(part.bytes for part in parts)
    return [*parts, MemoryPart("allocator and kernels (estimate)", OVERHEAD * total, "")]


def _on_cpu(config: Config) -> bool:
    device = config.runtime.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def trained_parameters(config: Config, student: ModelShape) -> int:
    """All of the student's, or those of its adapters."""
    adapters = config.student.lora
    return student.parameters if adapters is None else lora_parameters(student, adapters.rank)


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of adapters on the seven linear layers of every decoder layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


def kv_bytes_per_token(shape: ModelShape, size: int) -> float:
    """Keys and values of all layers."""
    return 2.0 * size * shape.layers * shape.kv_heads * shape.head_dim


def activation_bytes(shape: ModelShape, size: int, checkpointing: bool) -> float:
    """Per token: kept for the backward pass by all layers, or by one and the input of each with checkpointing."""
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * 2
    layer = size * (6 * shape.hidden + attention + 4 * shape.intermediate)
    if checkpointing:
        return float(layer + size * shape.layers * shape.hidden)
    return float(layer * shape.layers)


def disk_bytes(config: Config, student: ModelShape) -> dict[str, float]:
    """Upper bounds, with every response of full length: cache, checkpoints, final model."""
    prompts = config.data.limit or config.train.steps * config.rollout.prompts_per_step
    tokens = prompts * config.prefixes.samples_per_prompt * config.prefix_max_tokens
    return {
        "prefixes and scores": float((8 + CACHE_BYTES) * tokens),
        "checkpoints": 12.0 * trained_parameters(config, student) * (config.train.keep_checkpoints + 1),
        "final student": float(BYTES[config.student.settled_dtype] * student.parameters),
    }


def shapes(run: Run) -> tuple[ModelShape, ModelShape | None]:
    """Student and, where training would start it here, teacher."""
    return _shape(run, "student"), None if run.config.teacher.urls else _shape(run, "teacher")


def _shape(run: Run, role: str) -> ModelShape:
    settings: ModelConfig = getattr(run.config, role)
    folder = model_directory(run.workspace, settings, role)
    return ModelShape.of(load_model_config(folder, trust_remote_code=settings.trust_remote_code))


def prompt_tokens(run: Run) -> list[Sequence[int]]:
    """The first training prompts as token ids; none while the file is not there. Bad and long ones are passed over."""
    path = run.workspace.resolve(run.config.data.prompts)
    if not path.is_file():
        return []
    prompts, _ = scan_prompts(path, run.config.data)
    room = min(role_room(run, role) for role in ("student", "teacher"))
    tokenizer = role_tokenizer(run, "student")
    found = encode_prompts(
        prompts[:LOOKED_AT],
        tokenizer,
        chat=run.config.data.chat,
        template_args=run.config.student.chat_template_args,
        max_length=room,
        date=run.config.data.template_date,
    )
    return tokens_of(found.prompts)
