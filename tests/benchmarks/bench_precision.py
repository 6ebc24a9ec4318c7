"""What rounding to bfloat16 adds to log-probs, part by part: ``python tests/benchmarks/bench_precision.py MODEL``.

MODEL is a folder with a chat model that ``lean`` decodes (Llama, Mistral, Qwen2, Qwen3), such as the teacher of
``make demo-llm``. It answers a few questions in float32, and all that follows computes log-probs of these tokens:

1. in float32, with a single kind of number rounded to bfloat16 (weights, operands, results, …), against no rounding;
2. by the paths of a run in bfloat16, as they are and with one thing changed, against float32 and against each other.

A difference is printed as mean, 99th percentile and largest, in nats; and as the share of outliers that it would make of
a student that is its own teacher, the mean of 1 - min(exp(difference), 1). Without instructions for bfloat16
(`lscpu | grep -E 'avx512_bf16|amx_bf16'`) the second part takes minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tropd.pipeline.models.attention.float32_attention import attend_in_float32
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder, LeanModel, next_logits
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model, load_tokenizer, stop_token_ids
from tropd.pipeline.models.runtime import autocast, evaluation_mode
from tropd.pipeline.objectives.partition import acceptance
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.update.student import StudentPass
from tropd.pipeline.training.update.trainer_proof import row_logprobs

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colors.",
    "What do bees make, and why?",
    "Explain in one sentence what a river is.",
    "Who wrote Hamlet, and when?",
    "Give a synonym of happy.",
    "What is 12 + 7?",
)
CPU = torch.device("cpu")
Floats = npt.NDArray[np.float32]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def linears(model: Any) -> list[torch.nn.Linear]:
    """The products within layers."""
    return [m for layer in model.model.layers for m in layer.modules() if type(m) is torch.nn.Linear]


# ------------------------------------------------------------------------------------ one kind at a time


def round_weights(model: Any, stack: ExitStack) -> None:
    for linear in linears(model):
        stack.callback(linear.weight.data.copy_, linear.weight.data.clone())
        linear.weight.data.copy_(rounded(linear.weight.data))


def round_folded(model: Any, stack: ExitStack) -> None:
    """Weights of products with those of the norm before them in them."""
    before = {
        id(linear): norm
        for layer in model.model.layers
        for norm, part, names in (
            (layer.input_layernorm, layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, layer.mlp, ("gate_proj", "up_proj")),
        )
        for linear in (getattr(part, name) for name in names)
    }
    for linear in linears(model):
        stack.callback(linear.weight.data.copy_, linear.weight.data.clone())
        norm = before.get(id(linear))
        scale = 1.0 if norm is None else norm.weight.data.clone()
        linear.weight.data.copy_(rounded(linear.weight.data * scale))
    for norm in before.values():
        stack.callback(norm.weight.data.copy_, norm.weight.data.clone())
    for norm in before.values():
        norm.weight.data.fill_(1.0)


def round_operands(model: Any, stack: ExitStack) -> None:
    for linear in linears(model):
        stack.callback(linear.register_forward_pre_hook(lambda _, given: rounded(given[0])).remove)


def round_results(model: Any, stack: ExitStack) -> None:
    for linear in linears(model):
        stack.callback(linear.register_forward_hook(lambda _m, _g, found: rounded(found)).remove)


def round_activations(model: Any, stack: ExitStack) -> None:
    """What SiLU gives, before it is multiplied."""
    for layer in model.model.layers:
        hook = layer.mlp.act_fn.register_forward_hook(lambda _m, _g, found: rounded(found))
        stack.callback(hook.remove)


def round_residual(model: Any, stack: ExitStack) -> None:
    """What is added up from layer to layer, after the embedding, each attention, and each layer."""
    stack.callback(
        model.model.embed_tokens.register_forward_hook(lambda _m, _g, found: rounded(found)).remove
    )
    for layer in model.model.layers:
        missing: list[Tensor] = []

        def middle(_: Any, given: Any, missing: list[Tensor] = missing) -> Tensor:
            missing[:] = [rounded(given[0]) - given[0]]
            return rounded(given[0])

        def end(_m: Any, _g: Any, found: Any, missing: list[Tensor] = missing) -> Tensor:
            return rounded(found + missing[0])

        stack.callback(layer.post_attention_layernorm.register_forward_pre_hook(middle).remove)
        stack.callback(layer.register_forward_hook(end).remove)


def round_normed(model: Any, stack: ExitStack) -> None:
    """What a norm gives, before and after its weights, as in a model whose hidden states are bfloat16."""
    for module in model.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            hook = module.register_forward_hook(
                lambda m, _g, found: rounded(rounded(found / m.weight) * m.weight)
            )
            stack.callback(hook.remove)


def attend(model: Any, stack: ExitStack, change: Callable[..., Sequence[Tensor]], name: str) -> None:
    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        found, _ = sdpa_attention_forward(module, *change(q, k, v), mask, **options)
        return found.float(), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    stack.callback(model.set_attn_implementation, model.config._attn_implementation)
    model.set_attn_implementation(name)


def round_cache(model: Any, stack: ExitStack) -> None:
    attend(model, stack, lambda q, k, v: (q, rounded(k), rounded(v)), "bench_cache")


def attend_in_bfloat16(model: Any, stack: ExitStack) -> None:
    attend(model, stack, lambda *qkv: [x.bfloat16() for x in qkv], "bench_bfloat16")


def round_logits(model: Any, stack: ExitStack) -> None:
    stack.callback(model.lm_head.register_forward_hook(lambda _m, _g, found: rounded(found)).remove)


def add_backwards(model: Any, stack: ExitStack) -> None:
    """Products are added up in another order, which rounds nothing to bfloat16."""

    def backwards(linear: Any, given: Any, _: Tensor) -> Tensor:
        return functional.linear(given[0].flip(-1), linear.weight.flip(-1), linear.bias)

    for linear in linears(model):
        stack.callback(linear.register_forward_hook(backwards).remove)


Rounding = Callable[[Any, ExitStack], None]
KINDS: dict[str, Rounding] = {
    "logits (float32 in all paths)": round_logits,
    "residual stream": round_residual,
    "norms, before and after their weights": round_normed,
    "results of products": round_results,
    "operands of products": round_operands,
    "weights, norms folded in": round_folded,
    "weights": round_weights,
    "attention": attend_in_bfloat16,
    "keys and values of the cache": round_cache,
    "SiLU": round_activations,
    "nothing, but sums in another order": add_backwards,
}
PRODUCTS = (round_operands, round_results)
PATHS: dict[str, tuple[Rounding, ...]] = {
    "sampler": (round_weights, *PRODUCTS),
    "sampler, norms folded in": (round_folded, *PRODUCTS),
    "sampler, cache in bfloat16": (round_weights, *PRODUCTS, round_cache),
    "trainer": (round_weights, *PRODUCTS, round_activations),
    "trainer, sums in another order": (add_backwards, round_weights, *PRODUCTS, round_activations),
    "trainer, SiLU in float32, sums in another order": (add_backwards, round_weights, *PRODUCTS),
    "scorer": (round_weights, *PRODUCTS, round_activations, attend_in_bfloat16),
    "scorer, residual stream in bfloat16": (
        round_weights,
        *PRODUCTS,
        round_activations,
        attend_in_bfloat16,
        round_normed,
        round_residual,
    ),
}
PAIRS = (
    ("trainer", "trainer, sums in another order"),
    ("trainer", "sampler"),
    ("trainer", "sampler, norms folded in"),
    ("trainer", "sampler, cache in bfloat16"),
    ("trainer, SiLU in float32, sums in another order", "sampler"),
    ("scorer", "sampler"),
    ("scorer, residual stream in bfloat16", "sampler"),
)


# ------------------------------------------------------------------------------------------------ paths


def sampled_by_lean(model: Any, rows: Sequence[Row], dtype: torch.dtype | None, at_once: int = 64) -> Floats:
    """Log-probs of the rows' tokens by the steps that sample, each given the token that it should have drawn."""
    found = []
    weights = LeanModel(model, dtype)
    for low in range(0, len(rows), at_once):
        group = rows[low : low + at_once]
        found.append(_forced(weights, group))
    return np.concatenate(found)


def _forced(weights: LeanModel, rows: Sequence[Row]) -> Floats:
    columns: list[Tensor] = []

    def given(_sampling: Sampling, draws: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = torch.log_softmax(next_logits(*arguments), dim=-1)
        tokens = torch.tensor([row.tokens[min(len(columns), len(row.tokens) - 1)] for row in rows])
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        columns.append(chosen)
        return tokens, chosen, chosen

    steps = max(len(row.tokens) for row in rows)
    decoder = LeanDecoder(weights, max(len(row.sequence) for row in rows), Sampling(), given)
    draws = torch.zeros(len(rows), dtype=torch.float64)
    decoder.start([row.context for row in rows], steps, draws)
    for _ in range(steps - 1):
        decoder.step(draws)
    table = torch.stack(columns, dim=1).numpy()
    return np.concatenate([table[i, : len(row.tokens)] for i, row in enumerate(rows)])


def trained(passes: StudentPass, rows: Sequence[Row], precision: torch.dtype | None, budget: int) -> Floats:
    with evaluation_mode(passes.model), autocast(CPU, precision):
        return np.concatenate(row_logprobs(passes, rows, budget))


def scored(model: Any, rows: Sequence[Row], precision: torch.dtype | None = None) -> Floats:
    engine = TransformersEngine(model, [], autocast=precision)
    found = engine.score([row.sequence for row in rows], [len(row.context) for row in rows])
    return np.concatenate([one.token_logprobs for one in found])


def plain(model: Any, rows: Sequence[Row]) -> Floats:
    """By the model itself, a row at a time."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.sequence]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits[len(row.context) - 1 : -1].float(), dim=-1)
        found.append(logprobs.gather(-1, torch.tensor(row.tokens).unsqueeze(-1)).squeeze(-1).numpy())
    return np.concatenate(found)


# ----------------------------------------------------------------------------------------------- output


def show(name: str, one: Floats, other: Floats, seconds: float | None = None) -> None:
    size = np.abs(one.astype(np.float64) - other)
    outliers = float((1.0 - acceptance(other, one)).mean())
    took = "" if seconds is None else f"   {seconds:6.1f} s"
    print(
        f"  {name:<58} {size.mean():8.2g} {np.quantile(size, 0.99):8.2g} {size.max():8.2g}   {outliers:8.3%}{took}",
        flush=True,
    )


def answers(folder: Path, model: Any, prompts: int, tokens: int) -> list[Row]:
    tokenizer = load_tokenizer(folder)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS[:prompts]]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    stops = stop_token_ids(model.generation_config, tokenizer)
    engine = TransformersEngine(model, stops)
    drawn = engine.generate(
        encoded, Sampling(), seeds=range(len(encoded)), max_tokens=[tokens] * len(encoded)
    )
    plan = RowPlan(0, 0, (), (), None, False, 0)
    return [
        Row(replace(plan, prompt_tokens=prompt), one.tokens, one.logprobs, False)
        for prompt, one in zip(encoded, drawn, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--emulated", action="store_true", help="only what is computed in float32")
    parser.add_argument("--paths-only", action="store_true", help="only the paths themselves")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = load_model(given.model, dtype="float32", device=CPU)
    rows = answers(given.model, model, given.prompts, given.tokens)
    exact = plain(model, rows)
    print(
        f"{len(rows)} answers, {len(exact)} tokens, prompts of {min(len(r.context) for r in rows)} to "
        f"{max(len(r.context) for r in rows)}"
    )
    print(f"  {'':<58} {'mean':>8} {'p99':>8} {'largest':>8}   outliers")

    def emulated(*kinds: Rounding) -> Floats:
        with ExitStack() as stack:
            for kind in kinds:
                kind(model, stack)
            return plain(model, rows)

    if not given.paths_only:
        print("one kind of number rounded, against none")
        for name, kind in KINDS.items():
            show(name, emulated(kind), exact)
        print("all that a path rounds, against none")
        found = {name: emulated(*kinds) for name, kinds in PATHS.items()}
        for name, logprobs in found.items():
            show(name, logprobs, exact)
        print("one path and another")
        for one, other in PAIRS:
            show(f"{one} - {other}", found[one], found[other])
    if given.emulated:
        return

    low = torch.bfloat16
    attend_in_float32(model)
    passes = StudentPass(model, low)
    in_low = load_model(given.model, dtype="bfloat16", device=CPU)
    real: dict[str, Callable[[], Floats]] = {
        "sampler": lambda: sampled_by_lean(model, rows, low),
        "sampler, a row at a time": lambda: sampled_by_lean(model, rows, low, 1),
        "training pass": lambda: trained(passes, rows, low, 4096),
        "training pass, a row at a time": lambda: trained(passes, rows, low, 1),
        "scorer": lambda: scored(in_low, rows),
    }
    print("the paths themselves, in bfloat16, against float32")
    computed = {}
    for name, compute in real.items():
        started = time.perf_counter()
        computed[name] = compute()
        show(name, computed[name], exact, time.perf_counter() - started)
    print("and against each other")
    for one, other in (
        ("sampler", "sampler, a row at a time"),
        ("training pass", "training pass, a row at a time"),
        ("training pass", "sampler"),
        ("scorer", "sampler"),
    ):
        show(f"{one} - {other}", computed[one], computed[other])


if __name__ == "__main__":
    main()
