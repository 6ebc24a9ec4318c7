"""Memory and disk space of a training run, from the models' configurations alone.

Exact are parameters (the model is built without storage), gradients, AdamW's moments and the KV cache. Activations are
an estimate: autograd's memory per token of a decoder layer with fused attention, the inputs of its matrix products
and of its non-linear functions.

A step has three phases, in which other things are in memory: its peak is the largest of them, and what is there always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import described_directory
from tropd.pipeline.models.engines.decoding import batch_sizes
from tropd.pipeline.models.engines.decoding_any import FIRST_STEPS, PREFILL_TOKENS
from tropd.pipeline.models.engines.scoring import LOGIT_ELEMENTS
from tropd.pipeline.models.loading import (
    context_length,
    load_model_config,
    model_without_weights,
    num_parameters,
)
from tropd.pipeline.models.output.logprobs import chunk_elements
from tropd.pipeline.problems.encoding import encode_prompts, tokens_of
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.storage.errors import ConfigError

GATHERED = "weights and gradients, gathered for a step"
ROOM = 0.8
"""Of a device's memory: a step gathers weights and reduces gradients once where it takes no more with them."""
BYTES = {"float32": 4, "bfloat16": 2}
# The share that allocators and kernels take besides.
OVERHEAD = 0.1
LOOKED_AT = 2000
"""Prompts whose lengths are counted."""
LIBRARIES = 0.6e9
"""Main memory of a process that has loaded Python, PyTorch and transformers."""
CACHE_BYTES = 95
"""Per token of the teacher cache (docs/cache.md)."""
GPU_BYTES = 80e9
"""Memory of a GPU whose size is not known."""
SLEEPING = 2e9
"""Of vLLM's share, what a sleeping engine keeps: CUDA's context, kernels' workspaces, CUDA graphs. Seen were 0.8 GB (a
model of 1B, github.com/NVIDIA-NeMo/RL/issues/223) and 1.1 GB (vllm-project/vllm/issues/32714); graphs of many sizes take
up to 1.5 GB more (vllm-project/vllm/issues/47654)."""
CONTEXT = 0.6e9
"""Of CUDA, in each process on a GPU."""

Phase = Literal["", "rollout", "score", "train"]
PHASES: tuple[Phase, ...] = ("rollout", "score", "train")


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
    tied: bool = False
    """Whether the output layer's weights are those of the embeddings."""

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
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )


@dataclass(frozen=True)
class MemoryPart:
    """Something that takes memory in each process, and the setting that makes it smaller."""

    name: str
    bytes: float
    smaller: str
    phase: Phase = ""
    """The only phase of a step in which it is there; empty: always."""


def peak_bytes(parts: Iterable[MemoryPart]) -> float:
    """Memory of the phase that takes the most, with all that is there always."""
    parts = list(parts)
    phases = [sum(part.bytes for part in parts if part.phase == phase) for phase in PHASES]
    return sum(part.bytes for part in parts if not part.phase) + max(phases)


def masks_rows(config: Config, *, on_gpu: bool) -> bool:
    """Whether training's packed rows need a mask: without one are attention within rows and flash-attn."""
    settled = on_gpu and config.student.settled_dtype != "float32" and not config.runtime.compile
    return config.train.attention == "auto" and not settled


def memory_parts(
    config: Config,
    student: ModelShape,
    teacher: ModelShape | None,
    processes: int,
    *,
    longest_prompt: int = 0,
    gpu_bytes: float = GPU_BYTES,
) -> list[MemoryPart]:
    """Memory of each training process on its device, by purpose.

    Args:
        teacher: None where another device has it (``teacher.url``).
        processes: those that torchrun starts; weights, gradients and moments are shared out.
        longest_prompt: in tokens, where it is known.
        gpu_bytes: of which vLLM takes its share, and chunks of logits theirs; on a CPU a process's part of main memory.
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
    tokens = min(max(config.train.micro_batch(longest), longest), rows * longest)
    scored = min(max(config.service.batch_tokens, longest), rows * longest)
    parts = [
        *([MemoryPart("frozen weights", width * frozen / processes, "student.dtype")] if frozen else []),
        MemoryPart("weights, float32" if not frozen else "adapters", 4 * share, "more processes"),
        MemoryPart("gradients", 4 * share, "more processes", "train"),
        MemoryPart("AdamW's moments", 8 * share, "more processes"),
        MemoryPart(
            "activations of a micro-batch",
            tokens * activation_bytes(student, compute, config.train.gradient_checkpointing),
            "train.micro_batch_tokens, train.gradient_checkpointing = true",
            "train",
        ),
        MemoryPart(
            "log-probs: a chunk of logits",
            3.0 * 4 * min(chunk_elements(None if on_cpu else gpu_bytes), tokens * student.vocab),
            "",
            "train",
        ),
        MemoryPart("log-probs: the head's gradient", 4.0 * student.vocab * student.hidden, "", "train"),
        *_rollout_parts(config, student, longest_prompt, -(-rows // processes), compute, cached, gpu_bytes),
    ]
    if config.objective.extrapolation is not None:
        name, remedy = "weights to extrapolate from, float32", "objective.extrapolation"
        # Those to go back to are there while candidates are scored, when gradients are not.
        parts += [
            MemoryPart(name, 4 * share, remedy),
            MemoryPart("weights to go back to, float32", 4 * share, remedy, "rollout"),
        ]
    if masks_rows(config, on_gpu=not on_cpu):
        copied = 2 * student.heads * student.head_dim * compute
        parts.append(
            MemoryPart(
                "attention: masks, repeated keys and values",
                tokens * (longest * compute + copied),
                "train.micro_batch_tokens, train.attention",
                "train",
            )
        )
    processes_here = 1 if teacher is None else 2
    if on_cpu:
        parts.append(MemoryPart("programs and libraries", LIBRARIES * processes_here, ""))
    else:
        parts.append(MemoryPart("CUDA's contexts", CONTEXT * processes_here, ""))
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
        logits = min(LOGIT_ELEMENTS, scored * teacher.vocab)
        scoring = 3.0 * 4 * logits + scored * (size * 4 * (teacher.hidden + teacher.intermediate) + longest)
        if config.teacher.scorer == "vllm" and not on_cpu:
            parts.append(vllm_part("teacher in vLLM", config, gpu_bytes))
        else:
            parts.append(MemoryPart("teacher", size * teacher.parameters, "teacher.url on another GPU"))
            parts.append(MemoryPart("teacher: a scoring pass", scoring, "service.batch_tokens", "score"))
    gathered = MemoryPart(GATHERED, float(compute * student.parameters + 4 * trained), "", "train")
    training = sum(part.bytes for part in [*parts, gathered] if part.phase in ("", "train"))
    if processes > 1 and (1 + OVERHEAD) * training <= ROOM * gpu_bytes:
        parts.append(gathered)
    shares = sum(part.bytes for part in parts if part.name.endswith("in vLLM"))
    extra = OVERHEAD * (peak_bytes(parts) - shares)  # vLLM's share has all of it inside
    return [*parts, MemoryPart("allocator and kernels (estimate)", max(extra, 0.0), "")]


def _rollout_parts(
    config: Config,
    student: ModelShape,
    longest_prompt: int,
    rows: int,
    compute: int,
    cached: int,
    gpu_bytes: float,
) -> list[MemoryPart]:
    """Memory of sampling ``rows`` responses in one process."""
    if config.student.engine == "vllm" and not _on_cpu(config):
        part = vllm_part("student in vLLM", config, gpu_bytes)
        if config.train.max_staleness:  # it samples while the student trains
            return [part]
        asleep = MemoryPart("vLLM of the student, asleep", SLEEPING, "vllm.enforce_eager = true")
        return [
            replace(part, phase="rollout"),
            replace(asleep, phase="score"),
            replace(asleep, phase="train"),
        ]
    device = torch.device("cpu" if _on_cpu(config) else "cuda")
    batch = max(batch_sizes(rows, config.rollout.batch_size, device))
    prefix = 0 if config.objective.schedule.kind == "none" else config.prefix_max_tokens
    first = longest_prompt + prefix
    passed = compute * (
        3 * student.intermediate
        + (2 * student.heads + 4 * student.kv_heads) * student.head_dim
        + 6 * student.hidden
    )
    # Of its own: logits and, in a lower precision, the output layer's weights; outside it the logits again.
    head = compute * student.vocab * student.hidden if compute < BYTES["float32"] else 0
    graph = MemoryPart(
        "CUDA graph of a decoding step",
        float(head + 3 * 4 * batch * student.vocab),
        "runtime.cuda_graphs = false",
        "rollout",
    )
    return [
        MemoryPart(
            "KV cache of rollouts",
            batch
            * kv_columns(longest_prompt, config.rollout.max_tokens)
            * kv_bytes_per_token(student, cached),
            "rollout.batch_size, rollout.max_tokens",
            "rollout",
        ),
        *([graph] if config.runtime.cuda_graphs and device.type == "cuda" else []),
        MemoryPart(
            "first pass of rollouts: prompts, teacher prefixes",
            float(min(batch * first, max(batch, PREFILL_TOKENS)) * (passed + first)),
            "rollout.batch_size, prefixes.max_tokens",
            "rollout",
        ),
    ]


def kv_columns(prompt: int, tokens: int) -> int:
    """Columns of keys and values after so many tokens: a buffer that is full is replaced by one twice as large."""
    columns = prompt + min(tokens, FIRST_STEPS) + 1
    while columns < prompt + tokens:
        columns *= 2
    return columns


def vllm_part(name: str, config: Config, gpu_bytes: float) -> MemoryPart:
    """The share of a GPU that vLLM takes, whatever the model."""
    return MemoryPart(name, config.vllm.gpu_memory_utilization * gpu_bytes, "vllm.gpu_memory_utilization")


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
    per_parameter = 12.0 if config.objective.extrapolation is None else 16.0
    return {
        "prefixes and scores": float((8 + CACHE_BYTES) * tokens),
        "checkpoints": per_parameter
        * trained_parameters(config, student)
        * (config.train.keep_checkpoints + 1),
        "final student": float(BYTES[config.student.settled_dtype] * student.parameters),
    }


def shape_of(run: Run, role: str) -> ModelShape:
    """Of ``student`` or ``teacher``, whose weights are not needed: of a hub model, only small files are fetched.

    Raises:
        ConfigError, DataError: its configuration cannot be read, or is of another kind.
    """
    config = _model_config(run, role)
    try:
        return ModelShape.of(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{role}.model: its config.json does not say its sizes ({error})") from error


def _model_config(run: Run, role: str) -> Any:
    settings: ModelConfig = getattr(run.config, role)
    folder = described_directory(run.workspace, settings, role)
    return load_model_config(folder, trust_remote_code=settings.trust_remote_code)


def prompt_tokens(run: Run) -> list[Sequence[int]]:
    """The first training prompts as token ids; none while the file is not there. Bad and long ones are passed over."""
    path = run.workspace.resolve(run.config.data.prompts)
    if not path.is_file():
        return []
    prompts, _ = scan_prompts(path, run.config.data)
    roles = ("student",) if run.config.teacher.urls else ("student", "teacher")
    found = encode_prompts(
        prompts[:LOOKED_AT],
        role_tokenizer(run, "student", described_directory(run.workspace, run.config.student, "student")),
        chat=run.config.data.chat,
        template_args=run.config.student.chat_template_args,
        max_length=min(context_length(_model_config(run, role)) for role in roles),
        date=run.config.data.template_date,
    )
    return tokens_of(found.prompts)
