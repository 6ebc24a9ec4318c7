"""The student in training: one module from token ids to the log-probs that a loss needs, sharded where there are many.

With one process the model is used as it is. With several, FSDP2 (``fully_shard``) shards weights, gradients and
optimiser state; each decoder layer is a unit, gathered when it is needed, and everything else (embeddings, last
norm, head) is the unit of this module.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tropd.pipeline.config import Dtype
from tropd.pipeline.context import LoadedModel, Run, load_role
from tropd.pipeline.models import (
    SplitModel,
    decoder_layers,
    evaluation_mode,
    load_model,
    load_tokenizer,
    split_model,
)
from tropd.pipeline.training.batch import MicroBatch
from tropd.pipeline.training.logprobs import Lookups, TokenLogprobs, token_logprobs
from tropd.pipeline.training.lora import add_adapters
from tropd.pipeline.training.world import World
from tropd.storage.seeds import derive_seed

logger = logging.getLogger(__name__)


class StudentPass(torch.nn.Module):
    """A causal LM on micro-batches. The head is part of the forward pass, where FSDP can see its use."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._split = [split_model(model)]  # in a list: its parts are the model's, not modules of their own
        self.packs = _packs(model)

    @property
    def split(self) -> SplitModel:
        return self._split[0]

    def forward(self, batch: MicroBatch, lookups: Lookups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of ``TokenLogprobs``, as a tuple."""
        hidden = self.split.hidden(**batch.inputs)
        states = hidden[batch.row_index, batch.column_index]
        found: TokenLogprobs = token_logprobs(self.split, states, batch.targets, lookups)
        return found.targets, found.lookups, found.entropy, found.overlap


def _packs(model: Any) -> bool:
    """Whether the model takes rows one after another, told apart by their positions, for what they are."""
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(24, device=model.device) * 7 + 1).view(2, 12) % vocab
    lines = [[*range(12)], [*range(5), *range(7)]]
    positions = torch.tensor(lines, device=model.device)
    try:
        with torch.no_grad(), evaluation_mode(model):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[1:, 5:].float()
            alone = model(input_ids=ids[1:, 5:], use_cache=False).logits.float()
    except (TypeError, ValueError, RuntimeError):
        packed = alone = torch.full((1,), torch.nan)
    if torch.allclose(packed, alone, rtol=1e-3, atol=1e-3):
        return True
    logger.info("%s does not take packed rows: they are padded", type(model).__name__)
    return False


def shard(student: StudentPass, world: World, precision: torch.dtype | None) -> None:
    """Spread the weights over all processes, in float32; matrix products are in ``precision``."""
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for module in decoder_layers(student.model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
    fully_shard(student, mesh=world.mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or a state of it, gathered from all processes if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach()


def fill(tensor: Tensor, value: Tensor) -> None:
    """Set a parameter or a state of it to a whole value, of which a sharded one keeps its part."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            value = distribute_tensor(
                value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(value)


def copy_weights(source: Any, target: Any) -> None:
    """Set the weights of ``target`` to those of the sharded ``source``; every process must take part."""
    targets = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        value = whole(parameter)
        with torch.no_grad():
            targets[name].copy_(value)


def trainable_student(run: Run, folder: Path, device: torch.device, world: World) -> LoadedModel:
    """The student with float32 weights, in which updates of 5e-6 do not vanish; with adapters, only these.

    With several processes all weights are float32 and in main memory: what is sharded together has one type.
    """
    settings = run.config.student
    remote = settings.trust_remote_code
    alone = world.size == 1
    dtype: Dtype = settings.dtype if settings.lora is not None and alone else "float32"
    device = device if alone else torch.device("cpu")
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=remote)
    _adapt(run, model)
    if run.config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    return LoadedModel(folder, model, tokenizer, compiles=run.config.runtime.compile)


def whole_student(run: Run, folder: Path) -> Any:
    """A copy of the student for inference beside the sharded one, with the same parameters."""
    model = load_role(run, "student", folder).model
    _adapt(run, model)
    return model


def _adapt(run: Run, model: Any) -> None:
    settings = run.config.student.lora
    if settings is not None:
        add_adapters(model, settings, derive_seed(run.config.run.seed, "lora") % 2**31)
