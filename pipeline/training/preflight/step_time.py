"""Seconds of a training step on n GPUs, from rates: the events of a step, and arithmetic between them.

Legend: N parameters · L layers · D = heads x head size · S length of a row with its prompt.

Operations of a pass over rows: 2 N per token, 4 S D L / 2 per token and row of causal attention (without the half where a
dense mask stands in the way). A training pass with recomputed activations takes 4 times that of its layers (forward,
forward again, and twice for the backward pass), 4 times that of the output layer, and 4.5 times that of attention.

A decoding step reads the weights once, and the keys and values of every row that is not done.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from tropd.pipeline.config.sections.value_types import EngineName
from tropd.pipeline.training.memory_plan import ModelShape, kv_bytes_per_token
from tropd.pipeline.training.preflight.rates import GpuRates

LOW = 2
"""Bytes of a number in bfloat16."""
PASSES_OF_TRAINING, ATTENTION_PASSES_OF_TRAINING = 4.0, 4.5


@dataclass(frozen=True)
class StepWork:
    """The rows of a step."""

    prompt: int
    """Tokens of a prompt."""
    lengths: tuple[int, ...]
    """Tokens of each response, teacher prefix included."""
    own: float = 1.0
    """Share of a response that the student writes itself, on average over the run."""
    alternatives: bool = False
    """Whether the teacher gives alternatives of every token."""

    @property
    def tokens(self) -> int:
        """Tokens that student and teacher pass over."""
        return sum(self.prompt + length for length in self.lengths)

    def share(self, part: int, parts: int) -> StepWork:
        """The rows of one of several processes."""
        return StepWork(self.prompt, self.lengths[part::parts], self.own, self.alternatives)


@dataclass(frozen=True)
class NodeLayout:
    """Where a step's phases run."""

    trainers: int
    """GPUs that roll out and train, one process each."""
    student: EngineName
    """The engine that rolls out."""
    servers: int
    """GPUs that only serve the teacher; 0: it is beside the trainers."""
    everywhere: bool = True
    """Without servers: each trainer's GPU has the teacher; otherwise the first one has it, for all."""
    scorer: EngineName = "transformers"
    batch_size: int = 64
    """Rows that transformers decodes together."""
    micro_batch_tokens: int = 16_592
    masks: bool = True
    """Training passes have dense attention masks; passes that score have none."""
    kv_room: float = 40e9
    """Bytes of a GPU for keys and values in vLLM."""
    asks_early: bool = True
    """Servers are asked about rows as they end, not when all of a process have ended."""
    is_reference: bool = False
    """Another pipeline than tropd, whose steps have another rest."""

    @property
    def gpus(self) -> int:
        return self.trainers + self.servers


@dataclass(frozen=True)
class StepTime:
    """Seconds from the start of a step to the end of each phase's last process, and where they went."""

    rollout: float
    teacher: float
    """After the last rollout."""
    train: float
    rest: float
    busy: float
    """Share of all GPUs' time in which kernels run."""

    @property
    def total(self) -> float:
        return self.rollout + self.teacher + self.train + self.rest

    def gpu_hours(self, steps: int, gpus: int) -> float:
        return steps * self.total * gpus / 3600


def predict(
    layout: NodeLayout, work: StepWork, student: ModelShape, teacher: ModelShape | None, rates: GpuRates
) -> StepTime:
    """The step's phases; a barrier is where all processes meet: before and after training.

    Args:
        teacher: None where nothing is asked.
    """
    shares = [work.share(part, layout.trainers) for part in range(layout.trainers)]
    busy = 0.0
    ends = []
    for share in shares:
        rows, in_kernels = row_ends(layout, share, student, rates)
        ends.append(rows)
        busy += in_kernels
    written = [max(rows, default=0.0) for rows in ends]
    answered = list(written)
    if teacher is not None:
        busy += sum(score_seconds(layout, share, teacher, rates) for share in shares)
        answered = _answered(layout, shares, ends, teacher, rates)
    trained = []
    for share in shares:
        seconds, in_kernels = train_seconds(layout, share, student, rates)
        trained.append(seconds)
        busy += in_kernels
    rollout, ready, train = max(written), max(answered), max(trained)
    rest = (rates.reference_rest if layout.is_reference else rates.step_rest).value
    return StepTime(rollout, ready - rollout, train, rest, busy / (layout.gpus * (ready + train + rest)))


def _answered(
    layout: NodeLayout,
    shares: Sequence[StepWork],
    ends: Sequence[Sequence[float]],
    teacher: ModelShape,
    rates: GpuRates,
) -> list[float]:
    """When each process has its answers: from the teacher on its GPU, or in a queue, first come, first served."""
    jobs = []
    for process, (share, rows) in enumerate(zip(shares, ends, strict=True)):
        if layout.servers and layout.asks_early:
            parts = [(end, share.share(i, len(rows))) for i, end in enumerate(rows)]
        else:
            parts = [(max(rows, default=0.0), share)]
        jobs += [(end, process, score_seconds(layout, part, teacher, rates)) for end, part in parts]
    if not layout.servers and layout.everywhere:
        return [end + seconds for end, _, seconds in jobs]
    free = [0.0] * max(1, layout.servers)
    answered = [0.0] * len(shares)
    for end, process, seconds in sorted(jobs):
        done = max(heapq.heappop(free), end) + seconds
        answered[process] = max(answered[process], done)
        heapq.heappush(free, done)
    return answered


def decode_seconds(
    layout: NodeLayout, work: StepWork, shape: ModelShape, rates: GpuRates
) -> tuple[float, float]:
    """Seconds in which a GPU writes these responses, and those of them in kernels."""
    ends, in_kernels = row_ends(layout, work, shape, rates)
    return max(ends, default=0.0), in_kernels


def row_ends(
    layout: NodeLayout, work: StepWork, shape: ModelShape, rates: GpuRates
) -> tuple[list[float], float]:
    """When a GPU that begins now has written each response, and its seconds in kernels until all are written.

    Batches are equally large. In a batch, time passes from the end of one row to that of the next.
    """
    ends = [0.0] * len(work.lengths)
    if not ends:
        return ends, 0.0
    order = sorted(range(len(ends)), key=lambda row: work.lengths[row], reverse=True)
    kv, bandwidth = kv_bytes_per_token(shape, LOW), rates.memory_bandwidth.value
    before = work.prompt + (1 - work.own) * max(work.lengths)
    if layout.student == "vllm":
        most = max(1, int(layout.kv_room / (kv * (work.prompt + max(work.lengths)))))
        overhead, copies, read = rates.vllm_token.value, 1.0, float(LOW * shape.parameters)
    else:
        most = layout.batch_size
        overhead, copies, read = rates.transformers_token.value, rates.transformers_copies.value, 0.0
    # transformers on a GPU takes up to a quarter more rows where that saves a batch.
    batches = ceil(len(ends) / (most if layout.student == "vllm" else 1.25 * most))
    total = in_kernels = 0.0
    for number in range(batches):
        rows = order[number::batches]
        position = 0.0
        for active in range(len(rows), 0, -1):
            end = work.own * work.lengths[rows[active - 1]]
            if end > position:
                context = before + (position + end) / 2
                moved = (read + copies * active * kv * context) / bandwidth
                total += (end - position) * (overhead + moved)
                in_kernels += (end - position) * moved
                position = end
            ends[rows[active - 1]] = total
    return ends, in_kernels


def score_seconds(layout: NodeLayout, work: StepWork, shape: ModelShape, rates: GpuRates) -> float:
    """Seconds of one GPU's pass over these rows, prompts included."""
    attention = 0.5 * _attention(work, shape) / rates.attention_causal.value
    once = 2.0 * _passed(shape) * work.tokens / rates.dense_forward.value + attention
    if layout.scorer == "transformers":
        return once
    again, numbers = (2.0, rates.vllm_score_token.value * work.tokens) if work.alternatives else (1.0, 0.0)
    return again * once + numbers


def train_seconds(
    layout: NodeLayout, work: StepWork, shape: ModelShape, rates: GpuRates
) -> tuple[float, float]:
    """Seconds of one GPU's forward and backward passes over these rows, and those of them in kernels."""
    if not work.lengths:
        return 0.0, 0.0
    rate, half = (rates.attention_masked_training, 1.0) if layout.masks else (rates.attention_causal, 0.5)
    dense = PASSES_OF_TRAINING * 2.0 * _passed(shape) * work.tokens / rates.dense_training.value
    attention = ATTENTION_PASSES_OF_TRAINING * half * _attention(work, shape) / rate.value
    longest = work.prompt + max(work.lengths)
    line = max(1, layout.micro_batch_tokens // longest) * longest
    waits = rates.micro_batch_host.value * ceil(work.tokens / line)
    return dense + attention + waits, dense + attention


def model_operations(lengths: Sequence[int], shape: ModelShape, *, adapters: bool) -> float:
    """Operations that forward and backward pass over rows of these lengths need, nothing done twice.

    The backward pass takes twice the forward pass; once in matrix products whose weights have no gradient.
    """
    work = StepWork(prompt=0, lengths=tuple(lengths))
    dense = 2.0 * _passed(shape) * work.tokens
    return (2.0 if adapters else 3.0) * dense + 3.0 * 0.5 * _attention(work, shape)


def _passed(shape: ModelShape) -> int:
    """Parameters that a pass multiplies with: layers and output layer, not the embeddings (which it looks up)."""
    table = shape.vocab * shape.hidden
    return shape.parameters - (0 if shape.tied else table)


def _attention(work: StepWork, shape: ModelShape) -> float:
    """Operations of attention on the whole square of each row, one forward pass."""
    squares = sum((work.prompt + length) ** 2 for length in work.lengths)
    return 4.0 * shape.heads * shape.head_dim * shape.layers * squares
