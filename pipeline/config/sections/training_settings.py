"""Settings of the run and its training: rollouts, optimizer, supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tropd.pipeline.config.sections.value_types import MOST, MOST_ROWS, MOST_TOKENS, Beta, TokenId
from tropd.pipeline.objectives.spec import Apart, Inert, Spec

LEAST_MICRO_BATCH = 4096
"""Tokens of a micro-batch, where none are set and rows are short."""


class RunConfig(Spec):
    """The run as a whole."""

    recipe: str = ""
    """The packaged recipe that config.toml was made from (for the record; changing it changes nothing)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Root of every random choice. The same seed and settings give the same result."""


class RolloutConfig(Spec):
    """The student's responses during training."""

    prompts_per_step: int = Field(default=128, ge=1, le=MOST_ROWS)
    """Prompts per step."""
    samples_per_prompt: int = Field(default=4, ge=1, le=MOST_ROWS)
    """Responses per prompt."""
    max_tokens: int = Field(default=8096, ge=1, le=MOST_TOKENS)
    """Longest response, teacher prefix included (the paper's number is 8,096)."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Sampling temperature. Losses are at temperature 1, and corrected for the difference (train.importance_clip)."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the most likely tokens whose total probability reaches this."""
    stop_ids: Apart[tuple[TokenId, ...] | None] = Field(default=None, min_length=1)
    """Token ids that end a response, of student and teacher in all stages. If not set: a teacher's are those of its
    tokenizer and generation_config.json, the student's are its own and the teacher's."""
    batch_size: Inert[int] = Field(default=64, ge=1, le=MOST_ROWS)
    """Sequences decoded together; on a GPU up to a quarter more, rather than few in a last batch."""

    @property
    def plain(self) -> bool:
        """Tokens are drawn from the student's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0


class TrainConfig(Spec):
    """Optimization."""

    steps: int = Field(default=200, ge=1, le=MOST)
    """Optimizer steps."""
    learning_rate: float = Field(default=5e-6, gt=0.0, le=1000.0)
    """Peak learning rate (AdamW)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps over which the learning rate rises from 0; in a shorter run, all steps but the last."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1000.0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e12)
    """Gradients are scaled down to this norm."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """1: the student's responses for the next step are sampled and scored while this step trains, so by weights that are
    one update behind. 0: strictly on-policy."""
    importance_clip: Apart[float] = Field(default=2.0, gt=0.0, le=1e9)
    """c of the weight min(π_θ/μ, c) that corrects for responses sampled from another distribution μ than the student's
    own (older weights, another engine, another temperature or top-p, or bfloat16, in which sampler and trainer round
    differently), where the objective does not set its own."""
    micro_batch_tokens: Apart[int | None] = Field(default=None, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward and backward pass; gradients are accumulated over a step. If not set: twice
    the step's longest row, so that little of a pass stays empty, and at least 4,096."""
    gradient_checkpointing: Inert[bool] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Inert[Literal["auto", "varlen", "flash_attention_2", "flash_attention_3"]] = "auto"
    """Attention of the student in training. auto: in bfloat16 on a CUDA GPU `varlen`, where the model takes it and
    runtime.compile is off; else PyTorch's scaled dot product, where packed rows need a mask quadratic in the packed
    length. varlen: packed rows are attended without a mask, by PyTorch's own kernel, with any number of processes; on a
    CPU row by row. flash_attention_2 and 3 need a CUDA GPU, the package `flash-attn` (or `flash_attn_3`),
    `student.dtype = "bfloat16"` and a single process."""
    dropout: Apart[bool] = False
    """Train the student with the dropout that its config.json names. Off, gradients are those of the
    student that samples. On, the dropout mask follows from the seed, the step, the process and the micro-batch."""
    region_gradients: Inert[bool] = False
    """Also measure the gradient norm of each region on its own (metrics grad_norm_trust, …): slower, and not
    with runtime.compile."""
    checkpoint_every: Inert[int] = Field(default=50, ge=1, le=MOST)
    """Steps between checkpoints."""
    keep_checkpoints: Inert[int] = Field(default=2, ge=1, le=MOST)
    """Newest checkpoints that are kept."""
    wandb_project: Inert[str | None] = Field(default=None, min_length=1)
    """Log metrics to this project of Weights & Biases too (pip install "tropd[wandb]")."""
    trace: Inert[bool] = False
    """Write train/trace.json: a timeline of each thread of every process, for ui.perfetto.dev."""
    evaluate_every: Inert[int] = Field(default=0, ge=0, le=MOST)
    """Steps between evaluations during training, of accuracy and of the distance to the teacher; 0 is never."""
    evaluate_problems: Inert[int] = Field(default=100, ge=1, le=MOST)
    """Problems per such evaluation of accuracy, spread over all. The distance has evaluation.distance_prompts."""

    def micro_batch(self, longest: int) -> int:
        """Effective ``micro_batch_tokens`` where the longest row has so many tokens."""
        return self.micro_batch_tokens or max(LEAST_MICRO_BATCH, 2 * longest)

    @property
    def warmup(self) -> int:
        """Effective steps of warm-up: the last step of a short trial has the whole learning rate."""
        return min(self.warmup_steps, self.steps - 1)


class SftConfig(Spec):
    """`tropd sft`: supervised fine-tuning on the teacher's trajectories (the paper's settings, but for the steps)."""

    steps: int = Field(default=1000, ge=1, le=MOST)
    """Optimizer steps (the paper trains on 14 million samples, about 27,000 steps)."""
    prompts_per_step: int = Field(default=512, ge=1, le=MOST_ROWS)
    """Trajectories per step."""
    learning_rate: float = Field(default=5e-5, gt=0.0, le=1000.0)
    """Peak learning rate; it falls to 0 as a cosine."""
    weight_decay: float = Field(default=0.1, ge=0.0, le=1000.0)
    """AdamW's weight decay."""
    warmup_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises."""
