"""What tropd does with a model beside what the model itself does; each check answers in a word or two.

``yes``: the same, to float32's rounding. ``refused``: tropd says that it cannot, with the reason. Anything else is a
mistake of tropd's, and begins with ``WRONG``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from architectures import VOCABULARY, tiny_model

from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import logprobs
from tropd.pipeline.models.output.logprobs import Lookups
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.update.lora import add_adapters, merged_state
from tropd.pipeline.training.update.micro_batches import Layout, micro_batches
from tropd.pipeline.training.update.student import StudentPass
from tropd.pipeline.training.update.trainer_proof import prove_pass
from tropd.storage.errors import ConfigError

TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-2
ROWS = [np.random.default_rng(n).integers(4, VOCABULARY, size=n).tolist() for n in (5, 12, 23, 31)]
STARTS = [2, 5, 9, 20]
NEW_TOKENS = 12


@dataclass(frozen=True)
class Answers:
    """A line of the table."""

    samples: str
    scores: str
    gradient: str
    lora: str
    reasons: tuple[str, ...] = ()
    """Why something was refused, without repetitions."""


def check(model_type: str) -> Answers:
    """All checks of an architecture; each on a model of its own."""
    try:
        model = tiny_model(model_type)
        with torch.no_grad():
            model(input_ids=torch.tensor(ROWS[:1]), use_cache=False)
    except Exception as error:
        return Answers(*["–"] * 4, reasons=(f"not made tiny: {_line(error)}",))
    reasons: list[str] = []
    checks = (_samples, _scores, _gradient, _lora)
    found = [_answer(one, copy_of(model, model_type), reasons) for one in checks]
    return Answers(*found, reasons=tuple(dict.fromkeys(reasons)))


def copy_of(model: Any, model_type: str) -> Any:
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # it keeps states of its last pass
        return tiny_model(model_type)


def _answer(one: Callable[[Any], str], model: Any, reasons: list[str]) -> str:
    try:
        return one(model)
    except ConfigError as error:
        reasons.append(error.message.removeprefix(f"{type(model).__name__}: "))
        return "refused"
    except Exception as error:
        return f"WRONG: {_line(error)}"


def _line(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:160]


def _within(difference: float, tolerance: float, what: str) -> str:
    return "yes" if difference <= tolerance else f"WRONG: {what} differ by {difference:.1e}"


def _samples(model: Any) -> str:
    """Greedy tokens of padded rows, and those of ``generate`` for each alone."""
    prompts = [row[:start] for row, start in zip(ROWS, STARTS, strict=True)]
    engine = TransformersEngine(model, [], batch_size=len(prompts))
    greedy = engine.generate(prompts, Sampling(0.0), seeds=range(4), max_tokens=[NEW_TOKENS] * 4)
    for prompt, own in zip(prompts, greedy, strict=True):
        try:
            ids = torch.tensor([prompt])
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, len(prompt) :].tolist()
        except Exception as error:
            return f"yes, but generate() fails: {_line(error)}"
        if theirs != own.tokens and _likelier(model, prompt, own.tokens, theirs):
            return "WRONG: other tokens than generate()"
    return "yes"


def _likelier(model: Any, prompt: list[int], own: list[int], theirs: list[int]) -> bool:
    """Whether the first token in which they differ is not a matter of rounding."""
    at = next(n for n, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1])
    logits = _plain(model, prompt + own[: at + 1])[-2]
    return abs(float(logits[own[at]] - logits[theirs[at]])) > TOLERANCE or float(logits[own[at]]) < float(
        logits.max() - TOLERANCE
    )


def _plain(model: Any, row: Sequence[int]) -> torch.Tensor:
    """``[T, V]`` log-probs of one row, unpadded."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0]
    return found.float().log_softmax(dim=-1)


def _own(model: Any, row: Sequence[int], start: int) -> torch.Tensor:
    """``[T - start]`` log-probs of a row's tokens."""
    return _plain(model, row)[torch.arange(start - 1, len(row) - 1), torch.tensor(list(row[start:]))]


def _scores(model: Any) -> str:
    found = TransformersEngine(model, [2]).score(ROWS, STARTS)
    with torch.no_grad():
        pairs = zip(found, ROWS, STARTS, strict=True)
        worst = max(float(np.abs(f.token_logprobs - _own(model, r, s).numpy()).max()) for f, r, s in pairs)
    return _within(worst, TOLERANCE, "log-probs")


def _gradient(model: Any) -> str:
    """Of a weighted sum of log-probs, by the training pass in chunks, and by autograd through plain passes."""
    passes = StudentPass(model)
    prove_pass(passes, model, ROWS)
    model.train()
    plan = RowPlan(0, 0, (), (), None, False, 0)
    rows = [
        Row(replace(plan, prompt_tokens=row[:start]), row[start:], [0.0] * (len(row) - start), False)
        for row, start in zip(ROWS, STARTS, strict=True)
    ]
    weights = torch.linspace(-1.0, 1.0, sum(len(row.tokens) for row in rows))
    whole, logprobs.CHUNK_ELEMENTS = logprobs.CHUNK_ELEMENTS, 4 * VOCABULARY
    try:
        for batch in micro_batches(
            Layout(rows, guided=False), 64, torch.device("cpu"), packing=passes.packing
        ):
            found = passes(batch, Lookups.none(batch.targets))[0]
            (found * weights[torch.from_numpy(batch.student_tokens)]).sum().backward()
    finally:
        logprobs.CHUNK_ELEMENTS = whole
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = torch.cat([_own(model, row, start) for row, start in zip(ROWS, STARTS, strict=True)])
    (expected * weights).sum().backward()
    return _within(_largest_difference(model, own), GRADIENT_TOLERANCE, "gradients")


def _largest_difference(model: Any, own: dict[str, Any]) -> float:
    """Among all parameters, relative to the largest entry of the gradient."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        one, other = own[name], parameter.grad
        if one is None and other is None:
            continue
        zeros = torch.zeros_like(parameter)
        one, other = zeros if one is None else one, zeros if other is None else other
        worst = max(worst, float((one - other).abs().max() / (other.abs().max() + 1e-3)))
    return worst


def _lora(model: Any) -> str:
    """Adapters after some steps, merged into another model of the same weights."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        before = _plain(model, ROWS[2])
    add_adapters(model, LoraSettings(rank=4, alpha=8.0), 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        _own(model, ROWS[2], 1).sum().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        merged.load_state_dict(merged_state(model))
        adapted = _plain(model, ROWS[2])
        if float((adapted - before).abs().max()) < 10 * TOLERANCE:
            return "WRONG: adapters do nothing"
        return _within(float((adapted - _plain(merged, ROWS[2])).abs().max()), TOLERANCE, "merged logits")
