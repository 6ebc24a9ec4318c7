"""One of several processes that make a step's gradient together; started by test_student.py, not a test itself.

Arguments: the rank, the number of processes, and a folder. Written there by each process for each case, for a step that
gathers once and for one that does not: whole gradients, and counts of collectives; and what the proof of its pass found.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from step_inputs import make_inputs, make_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.training.update import gradients as gradients_module
from tropd.pipeline.training.update.forward import pass_idly
from tropd.pipeline.training.update.gradients import backpropagate
from tropd.pipeline.training.update.student import StudentPass, shard, whole
from tropd.pipeline.training.update.trainer_proof import prove_pass
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError

CASES = (("tropd", "float32"), ("entropy-opd", "float32"), ("tropd", "bfloat16"))
"""Objectives, of which the second has a pass for statistics first; and the precision of the passes."""
BUDGET = 10
ROWS = [[5, 6, 7, 8, 9, 10, 12, 13], [11, 12, 13, 14]]
"""That a pass is proved on."""


class Counting(TorchDispatchMode):
    """Counts the collectives on tensors, by name (``CommDebugMode`` does not get through autograd here)."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def models() -> tuple[Any, Any]:
    """A student and another one as its teacher."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval(), Qwen3ForCausalLM(config).eval()


def step(
    objective_name: str, precision: str, world: World, gathers_once: bool
) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients of the second of two equal steps, and the collectives of its passes."""
    student, teacher = models()
    objective = load_objective(objective_name, {"k": 3})
    inputs = make_inputs(objective, make_rows(copy.deepcopy(student)), teacher)
    passes = StudentPass(student, None if precision == "float32" else torch.bfloat16)
    shard(passes, world, gathers_once=gathers_once)
    counts: Counter[str] = Counter()

    forward = StudentPass.forward

    def passed(self: StudentPass, *args: Any) -> Any:
        counts["passes"] += 1
        return forward(self, *args)

    def idled(*args: Any) -> Any:
        counts["idle"] += 1
        return pass_idly(*args)

    for _ in range(2):
        counts.clear()
        student.zero_grad(set_to_none=True)
        with (
            Counting(counts),
            mock.patch.object(StudentPass, "forward", passed),
            mock.patch.object(gradients_module, "pass_idly", idled),
        ):
            parameters = list(student.parameters())
            backpropagate(passes, parameters, objective, inputs, micro_batch_tokens=BUDGET, world=world)
    gradients = {name: whole(p.grad).clone() for name, p in student.named_parameters() if p.grad is not None}
    return gradients, counts


def proved(world: World, gathers_once: bool) -> dict[str, Any]:
    """The proof of a pass, and of one whose rows see each other; and how many parameters are left whole."""
    found: dict[str, Any] = {}
    for name in ("right", "blind"):
        student, _ = models()
        passes = StudentPass(student, torch.bfloat16)
        shard(passes, world, gathers_once=gathers_once)
        hidden = passes.split.hidden

        def blind(hidden: Any = hidden, **inputs: Any) -> Any:
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
            return hidden(**inputs)

        if name == "blind":
            object.__setattr__(passes.split, "hidden", blind)
        try:
            prove_pass(passes, models()[0], ROWS)
            found[name] = "proved"
        except ConfigError as error:
            found[name] = str(error)
        found[f"{name}, whole"] = sum(not isinstance(p, DTensor) for p in passes.parameters())
    return found


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, init_device_mesh("cpu", (size,)))
    for objective, precision in CASES:
        for name, once in (("once", True), ("each", False)):
            gradients, counts = step(objective, precision, world, once)
            file = folder / f"{objective}-{precision}-{name}-{rank}"
            save_file(gradients, file.with_suffix(".safetensors"))
            file.with_suffix(".json").write_text(json.dumps(counts))
    for name, once in (("once", True), ("each", False)):
        (folder / f"proof-{name}-{rank}.json").write_text(json.dumps(proved(world, once)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
