"""The cases: each runs on the CPU and on a device, and says how far apart they are and how often the host waited."""

from __future__ import annotations

import copy
import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
from pretend_cuda.device import moved, pretend
from pretend_cuda.record import Record
from pretend_cuda.sharding import mesh_of_one
from step_inputs import V, make_inputs, make_rows
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tropd.pipeline.config.recipe_files import load_objective, recipe_names
from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.config.sections.training_settings import TrainConfig
from tropd.pipeline.models.engines import transformers
from tropd.pipeline.models.engines.base import Sampling, everywhere
from tropd.pipeline.models.engines.decoding import decode
from tropd.pipeline.models.engines.scoring import batches_of
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import logprobs
from tropd.pipeline.objectives.needs import needs_student_pass
from tropd.pipeline.training.update.gradients import StepInputs, backpropagate
from tropd.pipeline.training.update.lora import add_adapters
from tropd.pipeline.training.update.micro_batches import Layout, micro_batches
from tropd.pipeline.training.update.optimizer import make_optimizer
from tropd.pipeline.training.update.student import StudentPass, shard, whole
from tropd.pipeline.training.world import World

BUDGET = 24
"""Tokens of a micro-batch, and of a scoring pass: there are several of each."""
CHUNK = 3
"""Positions whose logits are held at once."""
NEW_TOKENS = 32
PLAIN = Sampling()
Numbers = dict[str, Any]


@dataclass
class Place:
    """Where a case runs, and what it counts there."""

    kind: str
    """``cpu``, ``pretended`` or ``cuda``."""
    record: Record = field(default_factory=Record)
    units: int = 1
    waits: Counter[str] = field(default_factory=Counter)

    def put(self, model: Any) -> Any:
        model = copy.deepcopy(model)
        return moved(model) if self.kind == "pretended" else model.to(self.kind)

    @contextmanager
    def counting(self, units: int) -> Iterator[None]:
        """The waits in this block, from now on, are those of so many units."""
        self.units = units
        self.record.waits.clear()
        with mock.patch.object(logprobs, "chunk_elements", return_value=CHUNK * V):
            yield
        self.waits = Counter(self.record.waits)


Case = Callable[[Place], Numbers]


def _qwen2() -> Any:
    """Untied, with biases and grouped queries."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def _qwen3(rows: int) -> Any:
    """Tied, with norms of queries and keys; so many rows of its output layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


STUDENT = _qwen2()
PADDED = _qwen3(V + 8)


@functools.cache
def _rows() -> list[Any]:
    return make_rows(STUDENT, 9)


@functools.cache
def _teacher() -> Any:
    teacher = copy.deepcopy(STUDENT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return teacher


@functools.cache
def _inputs(objective: str) -> StepInputs:
    return make_inputs(load_objective(objective, {"k": 4}), _rows(), _teacher())


@functools.cache
def _with_adapters() -> Any:
    model = copy.deepcopy(STUDENT)
    with mock.patch.object(torch.cuda, "device_count", return_value=0):  # has no random numbers to keep
        add_adapters(model, LoraSettings(rank=2, alpha=4), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return model


def _step(
    place: Place,
    name: str,
    *,
    model: Callable[[], Any] = lambda: STUDENT,
    precision: torch.dtype | None = None,
    packing: str | None = None,
    num_tokens: int | None = None,
    checkpointing: bool = False,
) -> Numbers:
    """A training step with its optimizer."""
    student = place.put(model())
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.train()
    passes = StudentPass(student, precision, num_tokens)
    if packing is not None:
        passes.packing = packing  # type: ignore[assignment]
    inputs = _inputs(name)
    objective = load_objective(name, {"k": 4})
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = make_optimizer(student, TrainConfig(learning_rate=1e-3))
    assert optimizer.defaults["fused"] == (place.kind != "cpu")
    layout = Layout(inputs.rows, objective.guides)
    batches = list(micro_batches(layout, BUDGET, torch.device("cpu"), packing=passes.packing))
    times = 2 if needs_student_pass(objective) else 1
    with place.counting(times * len(batches)):
        outcome = backpropagate(passes, parameters, objective, inputs, micro_batch_tokens=BUDGET)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return {
        "losses": list(outcome.losses.values()),
        "log-probs": outcome.student_logprobs,
        "entropies": outcome.student_entropy,
        "overlap": outcome.overlap,
        "mass": outcome.student_topk_mass,
        "norm": float(norm),
        "weights": torch.cat([p.detach().reshape(-1) for p in parameters]).cpu(),
    }


def _sharded(place: Place, name: str) -> Numbers:
    """The loss and the gradient of a step whose weights FSDP2 shards, over one process."""
    passes, inputs, objective = StudentPass(place.put(STUDENT)), _inputs(name), load_objective(name, {"k": 4})
    with mesh_of_one() if place.kind == "pretended" else nullcontext() as mesh:
        shard(passes, World(0, 1, mesh))
        parameters = list(passes.parameters())
        layout = Layout(inputs.rows, objective.guides)
        batches = list(micro_batches(layout, BUDGET, torch.device("cpu"), packing=passes.packing))
        with place.counting(len(batches)):
            outcome = backpropagate(passes, parameters, objective, inputs, micro_batch_tokens=BUDGET)
        gradients = [whole(p.grad) for p in parameters if p.grad is not None]
        numbers = torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu()
    return {
        "losses": list(outcome.losses.values()),
        "log-probs": outcome.student_logprobs,
        "gradient": numbers,
    }


def _sequences() -> tuple[list[list[int]], list[int]]:
    written = [row for row in _rows() if row.tokens]
    return [row.sequence for row in written], [len(row.context) for row in written]


def _score(place: Place, *, where: bool, dtype: torch.dtype = torch.float32, model: Any = None) -> Numbers:
    """All rows of the step, scored in several passes."""
    engine = TransformersEngine(place.put(model or STUDENT).to(dtype), [1], batch_tokens=BUDGET, num_tokens=V)
    sequences, starts = _sequences()
    engine.score(sequences, starts)  # it proves itself
    with place.counting(len(list(batches_of(sequences, BUDGET)))):
        found = engine.score(
            sequences,
            starts,
            k=4,
            entropy=True,
            # The middle of log-probs that are rounded may be anywhere: positions tell.
            topk_where=(lambda i, s, e: np.arange(len(s)) % 2 == 0) if where else everywhere,
        )
    return {
        "log-probs": np.concatenate([one.token_logprobs for one in found]),
        "entropies": np.concatenate([one.entropy for one in found if one.entropy is not None]),
        "alternatives": np.concatenate([one.topk_logprobs.reshape(-1) for one in found]),
        "counts": [len(one.topk_positions) for one in found],
    }


def _generate(
    place: Place,
    *,
    sampling: Sampling = PLAIN,
    dtype: torch.dtype = torch.float32,
    equal: bool = False,
    stops: tuple[int, ...] = (1,),
    model: Any = None,
    batch_size: int = 64,
    graphs: bool = False,
    autocast: bool = False,
) -> Numbers:
    """Rows are decoded together; ``equal`` prompts need no padding."""
    engine = TransformersEngine(
        place.put(model or STUDENT).to(dtype),
        stops,
        num_tokens=V,
        lean=False,
        batch_size=batch_size,
        graphs=graphs,
        autocast=HALF if autocast else None,
    )
    prompts = [row.context[:4] if equal else row.context for row in _rows()]
    prompts = [[*p, *([2] * (4 - len(p)))] if equal else p for p in prompts]
    engine.generate(prompts[:2], sampling, seeds=[0, 1], max_tokens=[1, 1])  # it proves itself
    proved = engine.graphs.replays if engine.graphs else 0
    options: dict[str, Any] = {"seeds": list(range(9)), "max_tokens": [NEW_TOKENS] * 8 + [5]}
    with place.counting(NEW_TOKENS // 16), mock.patch.object(transformers, "decode", wraps=decode) as batches:
        found = engine.generate(prompts, sampling, **options)
    # A last row would take a GPU another batch: there it joins the others.
    assert batches.call_count == (2 if batch_size < len(prompts) and place.kind == "cpu" else 1)
    if graphs and place.kind != "cpu":
        assert engine.graphs is not None
        assert engine.graphs.works
        assert engine.graphs.replays > proved + max(len(one.tokens) for one in found) - 5
    if autocast:  # tokens may differ: their log-probs are those of the weights in float32, but for rounding
        exact = TransformersEngine(model or STUDENT, [1], num_tokens=V)
        rows = [[*prompt, *one.tokens] for prompt, one in zip(prompts, found, strict=True)]
        scores = exact.score(rows, [len(prompt) for prompt in prompts])
        gaps = np.concatenate([one.logprobs - s.token_logprobs for one, s in zip(found, scores, strict=True)])
        return {"beyond rounding": max(0.0, float(np.abs(gaps).max()) - 0.2)}
    return {
        "tokens": [token for one in found for token in one.tokens],
        "log-probs": [value for one in found for value in one.logprobs],
        "lengths": [len(one.tokens) for one in found],
    }


def _chunked(place: Place, *, tail: bool, dtype: torch.dtype, bias: bool) -> Numbers:
    """Log-probs of a head alone, with its gradients, some positions at a time."""
    generator = torch.Generator().manual_seed(0)
    n, hidden = 17, 8
    head = torch.nn.Linear(hidden, V, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    counts = np.array([0, 3, 0, 1, 5, 0, 0, 0, 0, V, 2, 0, 4, 0, 0, 1, 0], dtype=np.int64)
    ids = np.concatenate([torch.randperm(V, generator=generator)[:c].numpy() for c in counts])
    states = torch.randn(n, hidden, generator=generator)
    targets = torch.randint(V, (n,), generator=generator)
    head = place.put(head)
    device = head.weight.device
    states, targets = states.to(device).requires_grad_(), targets.to(device)
    split = logprobs.SplitModel(None, head, 4.0 if bias else None)
    lookups = logprobs.Lookups(torch.from_numpy(counts), torch.from_numpy(ids).to(device), tail)
    with place.counting(1), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = logprobs.token_logprobs(split, states, targets, lookups)
        finite = found.tail.masked_fill(found.tail.isinf(), 0.0)
        (found.targets.sum() + (found.lookups**2).sum() + (finite**2).sum()).backward()
    numbers = {name: value.detach().cpu() for name, value in vars(found).items()}
    gradients = [states.grad, *(p.grad for p in head.parameters())]
    return numbers | {f"gradient {i}": one.cpu() for i, one in enumerate(gradients) if one is not None}


HALF = torch.bfloat16
OBJECTIVES = [name for name in recipe_names("objectives") if name != "sft"]
CASES: dict[str, Case] = {
    **{f"step {name}": partial(_step, name=name) for name in OBJECTIVES},
    **{f"step {name} bfloat16": partial(_step, name=name, precision=HALF) for name in ("tropd", "vopd")},
    "step padded": partial(_step, name="tropd-cached", packing="padded"),
    "step checkpointed": partial(_step, name="tropd", checkpointing=True),
    "step padded vocabulary": partial(_step, name="tropd", model=lambda: PADDED, num_tokens=V),
    "step sharded": partial(_sharded, name="tropd"),
    "chunks": partial(_chunked, tail=False, dtype=torch.float32, bias=False),
    "chunks tail": partial(_chunked, tail=True, dtype=torch.float32, bias=True),
    "chunks bfloat16": partial(_chunked, tail=True, dtype=HALF, bias=False),
    "score": partial(_score, where=False),
    "score chosen": partial(_score, where=True),
    "score bfloat16": partial(_score, where=True, dtype=HALF),
    "score padded vocabulary": partial(_score, where=False, model=PADDED),
    "generate": partial(_generate),
    "generate greedy": partial(_generate, sampling=Sampling(0.0)),
    "generate nucleus": partial(_generate, sampling=Sampling(0.7, 0.9)),
    "generate equal prompts": partial(_generate, equal=True),
    "generate a batch and one row": partial(_generate, batch_size=8, model=PADDED),
    "generate with stops": partial(_generate, stops=(1, 2, 3)),
    "generate graphs": partial(_generate, graphs=True),
    "generate graphs bfloat16": partial(_generate, graphs=True, autocast=True, model=PADDED),
    "generate padded vocabulary": partial(_generate, model=PADDED),
}
if find_spec("peft"):
    CASES["step adapters"] = partial(_step, name="tropd", model=_with_adapters)


def run_all(names: Sequence[str], pretended: bool) -> dict[str, Any]:
    """What each case found, or why it could not end."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = _compared(CASES[name], CASES[name](Place("cpu")), pretended)
        except Exception:
            results[name] = {"error": traceback.format_exc()[-4000:]}
    return results


def _compared(case: Case, expected: Numbers, pretended: bool) -> dict[str, Any]:
    place = Place("pretended" if pretended else "cuda")
    if pretended:
        with pretend(place.record):
            found = case(place)
    else:
        found = case(place)
    return {
        "differences": {name: _difference(found[name], expected[name]) for name in expected},
        "waits": dict(place.waits),
        "per": place.units,
    }


def _difference(found: Any, expected: Any) -> float:
    """The largest, as a share of the largest number above 1; infinite where only one is a number, or there are more."""
    one, other = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    finite = other[np.isfinite(other)]
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - other)[~same] / max(1.0, float(np.abs(finite).max(initial=0.0)))
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))
