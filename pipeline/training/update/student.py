"""The student in training: one module from token ids to the log-probs that a loss needs, sharded over many processes.

With one process the model is used as it is. With several, FSDP2 (``fully_shard``) shards weights, gradients and
optimizer state; each decoder layer is a unit, gathered when it is needed, and everything else (embeddings, last
norm, head) is the unit of this module. Where there is room, a step gathers weights and reduces gradients once, not
in every micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from tropd.pipeline.config.sections.value_types import Dtype
from tropd.pipeline.models.attention.float32_attention import attend_in_float32
from tropd.pipeline.models.attention.row_attention import ROW_ATTENTION, attend_in_rows, row_inputs
from tropd.pipeline.models.loading import decoder_layers, load_model
from tropd.pipeline.models.output.logprobs import Lookups, TokenLogprobs, token_logprobs
from tropd.pipeline.models.output.output_layer import SplitModel, split_model
from tropd.pipeline.models.runtime import autocast, evaluation_mode, pick_device
from tropd.pipeline.models.stops import stop_ids
from tropd.pipeline.run.opening import LoadedModel, load_role, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.update import dropout
from tropd.pipeline.training.update.lora import add_adapters
from tropd.pipeline.training.update.micro_batches import MicroBatch, Packing
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError
from tropd.storage.seeds import derive_seed

logger = logging.getLogger(__name__)


class StudentPass(torch.nn.Module):
    """A causal LM on micro-batches. The head is part of the forward pass, where FSDP can see its use.

    Args:
        precision: of matrix products, where it is not that of the weights.
        num_tokens: ids that the tokenizer has; all rows of the output layer if None.
    """

    def __init__(
        self, model: Any, precision: torch.dtype | None = None, num_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._split = [
            split_model(model, num_tokens)
        ]  # in a list: its parts are the model's, not modules of their own
        self.precision = precision
        self.packing = _packing(model, precision)
        self.gathers_once = False
        """Whether a step gathers sharded weights and reduces their gradients once (see ``gathered_step``)."""

    @property
    def split(self) -> SplitModel:
        return self._split[0]

    @property
    def in_rows(self) -> bool:
        """Whether packed rows are attended without masks (see ``row_attention``)."""
        return bool(self.model.config._attn_implementation == ROW_ATTENTION)

    def forward(self, batch: MicroBatch, lookups: Lookups) -> tuple[Tensor, ...]:
        """The fields of ``TokenLogprobs``, as a tuple."""
        inputs = dict(batch.inputs)
        if self.in_rows:
            inputs |= row_inputs(batch.row_lengths, batch.targets.device)
        hidden = self.split.hidden(**inputs)
        states = hidden[batch.row_index, batch.column_index]
        found: TokenLogprobs = token_logprobs(self.split, states, batch.targets, lookups)
        return found.targets, found.lookups, found.entropy, found.overlap, found.tail


def _packing(model: Any, precision: torch.dtype | None) -> Packing:
    """The packing in which a model keeps rows apart; found by trying. Attention within rows that does not is given up."""
    in_rows = model.config._attn_implementation == ROW_ATTENTION
    for packing, lines in (("one line", 1),) if in_rows else (("lines", 2), ("one line", 1)):
        tells = _tells_rows_apart(model, lines, None)
        if tells is None:  # flash attention exists in half precision only
            tells = _tells_rows_apart(model, lines, precision)
        if tells:
            return cast(Packing, packing)
    if in_rows:
        model.set_attn_implementation("sdpa")
        return _packing(model, precision)
    logger.info("%s does not take packed rows: they are padded", type(model).__name__)
    return "padded"


def _tells_rows_apart(model: Any, lines: int, precision: torch.dtype | None) -> bool | None:
    """None if the model cannot compute that."""
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(12 * lines, device=model.device) * 7 + 1).view(lines, 12) % vocab
    positions = torch.arange(12, device=model.device).repeat(lines, 1)
    positions[-1] = torch.cat([torch.arange(5), torch.arange(7)])
    in_rows = model.config._attn_implementation == ROW_ATTENTION
    extra = row_inputs([12] * (lines - 1) + [5, 7], model.device) if in_rows else {}
    try:
        with torch.no_grad(), evaluation_mode(model), autocast(model.device, precision):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False, **extra).logits[-1:, 5:]
            alone = model(input_ids=ids[-1:, 5:], use_cache=False).logits
    except (TypeError, ValueError, RuntimeError):
        return None
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return torch.allclose(packed.float(), alone.float(), rtol=tolerance, atol=tolerance)


def shard(student: StudentPass, world: World, *, gathers_once: bool = False) -> None:
    """Spread the weights over all processes, in float32; matrix products in the student's precision.

    Args:
        gathers_once: in a step, for which whole weights and float32 gradients have to fit beside all else.
    """
    if world.mesh is None:
        return
    student.gathers_once = gathers_once
    policy = MixedPrecisionPolicy(param_dtype=student.precision, reduce_dtype=torch.float32)
    for module in decoder_layers(student.model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
    fully_shard(student, mesh=world.mesh, mp_policy=policy)


@contextmanager
def gathered_step(student: StudentPass, rounds: int) -> Iterator[Callable[[int], None]]:
    """Hold the passes of one step, with ``rounds`` backward passes in every process.

    A student that gathers once keeps its weights whole inside, and adds up gradients without the other processes, in
    float32 whatever the passes' precision (FSDP keeps sums in ``reduce_dtype``); the last round's are reduced.

    Yields:
        Called with its number, from 0, before each round.
    """
    if not (student.gathers_once and isinstance(student, FSDPModule)):
        yield lambda number: None
        return

    def begin(number: int) -> None:
        last = number == rounds - 1
        student.set_requires_gradient_sync(last)
        student.set_reshard_after_backward(last)

    student.set_reshard_after_forward(False)
    try:
        yield begin
    finally:
        begin(rounds - 1)
        # As FSDP begins: all but the outermost unit, which the backward pass needs first.
        student.set_reshard_after_forward(True)
        student.set_reshard_after_forward(False, recurse=False)
        reshard(student)  # it is, unless the step was cut short


def reshard(student: StudentPass) -> None:
    """Give up weights that passes without a gradient have gathered: until then its parameters are whole tensors."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter or a state of it, gathered from all processes if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach()


def copy_weights(source: Any, target: Any) -> None:
    """Set the weights of ``target`` to those of the sharded ``source``; every process must take part."""
    targets = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        value = whole(parameter)
        with torch.no_grad():
            targets[name].copy_(value)


def trainable_student(run: Run, folder: Path, device: torch.device, world: World) -> LoadedModel:
    """The student with float32 weights, in which updates of 5e-6 do not vanish; with adapters, only these.

    With several processes all weights are float32 and in main memory: tensors that are sharded together have one type.
    """
    settings = run.config.student
    remote = settings.trust_remote_code
    alone = world.size == 1
    dtype: Dtype = settings.settled_dtype if settings.lora is not None and alone else "float32"
    device = device if alone else torch.device("cpu")
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=remote)
    _adapt(run, model)
    if not run.config.train.dropout:
        dropout.turn_off(model)
    if run.config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    on_gpu = pick_device(run.config.runtime.device).type == "cuda"
    if run.config.train.attention != "auto":
        choose_attention(model, run, world)
    elif on_gpu and settings.settled_dtype != "float32" and not run.config.runtime.compile:
        attend_in_rows(model)
    elif settings.settled_dtype != "float32" and pick_device(run.config.runtime.device).type == "cpu":
        attend_in_float32(model)
    tokenizer = role_tokenizer(run, "student", folder)
    ends = stop_ids(run.workspace, run.config, "student", folder)
    runtime = run.config.runtime
    return LoadedModel(folder, model, tokenizer, ends, runtime.compile, runtime.cuda_graphs)


def check_attention(run: Run, world: World) -> None:
    """Refuse an attention that this machine does not have, before a model is loaded.

    Raises:
        ConfigError: for the package flash-attn no GPU exists, it is missing, or the student is float32 or spread over
            processes.
    """
    attention = run.config.train.attention
    if attention in ("auto", "varlen"):
        return
    on_gpu = pick_device(run.config.runtime.device).type == "cuda"
    if run.config.student.settled_dtype == "float32" or not on_gpu or world.size > 1:
        raise ConfigError(
            f"train.attention = {attention!r} needs a CUDA GPU, a student in bfloat16, and currently a single process",
            hint='set train.attention = "auto", which needs no package, or student.dtype = "bfloat16"',
        )
    installed = (
        is_flash_attn_2_available() if attention == "flash_attention_2" else is_flash_attn_3_available()
    )
    if not installed:  # transformers would look for a kernel on the Hugging Face hub
        raise ConfigError(
            f"train.attention = {attention!r} needs a package that is not installed, or not for this GPU",
            hint='install flash-attn (flash_attn_3 for version 3), or set train.attention = "auto"',
        )


def choose_attention(model: Any, run: Run, world: World) -> None:
    """Switch the model to ``train.attention``.

    Raises:
        ConfigError: see ``check_attention``; or the model does not take it.
    """
    check_attention(run, world)
    attention = run.config.train.attention
    reason = "it cannot be changed"
    if attention == "varlen":
        if attend_in_rows(model):
            return
        reason = "its attention has parts that need a mask"
    try:
        if attention != "varlen":
            model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = str(error)
    if model.config._attn_implementation != attention:
        raise ConfigError(
            f"train.attention = {attention!r} is not possible with {type(model).__name__}: {reason}",
            hint='set train.attention = "auto"',
        )


def whole_student(run: Run, folder: Path) -> Any:
    """A copy of the student for inference beside the sharded one, with the same parameters."""
    model = load_role(run, "student", folder).model
    _adapt(run, model)
    return model


def _adapt(run: Run, model: Any) -> None:
    settings = run.config.student.lora
    if settings is not None:
        add_adapters(model, settings, derive_seed(run.config.run.seed, "lora") % 2**31)
