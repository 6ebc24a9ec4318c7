"""Attention in float32 is what SDPA gives, only without its rounding, for every way that rows are laid out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_runs import TINY

from tropd.pipeline.models.attention.float32_attention import FLOAT32_SDPA, attend_in_float32
from tropd.pipeline.models.runtime import masked_attention
from tropd.pipeline.training.update.student import StudentPass, trainable_student
from tropd.pipeline.training.world import ALONE

BF16 = torch.bfloat16
IDS = torch.arange(24).view(2, 12) * 7 % 40
PACKED = torch.cat([torch.arange(12), torch.arange(5), torch.arange(7)]).view(2, 12)
LAYOUTS: dict[str, dict[str, torch.Tensor]] = {
    "whole": {},
    "padded": {"attention_mask": (torch.arange(24).view(2, 12) < 20).long()},
    "packed": {"position_ids": PACKED},
}


def make(kind: str = "Qwen3") -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**TINY)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def results(model: Any, layout: str, precision: torch.dtype | None) -> list[torch.Tensor]:
    """Logits, and all gradients in one vector."""
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=precision is not None):
        logits = model(input_ids=IDS, use_cache=False, **LAYOUTS[layout]).logits.float()
    logits.logsumexp(dim=-1)[:, :8].sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [logits[:, :8].detach(), gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_as_near_to_float32_as_attention_in_bfloat16(layout: str) -> None:
    plain = make()
    precise = copy.deepcopy(plain)
    attend_in_float32(precise)
    exact = results(plain, layout, None)
    for one, two in zip(results(precise, layout, None), exact, strict=True):
        assert torch.equal(one, two)
    found, rounded = results(precise, layout, BF16), results(plain, layout, BF16)
    for one, other, two in zip(found, rounded, exact, strict=True):
        distance, allowed = (one - two).norm(), (other - two).norm()
        assert 0 < distance < 1.2 * allowed
        assert distance < 0.05 * two.norm()


def test_packed_rows_are_told_apart() -> None:
    model = make()
    expected = StudentPass(model, BF16).packing
    attend_in_float32(model)
    assert StudentPass(model, BF16).packing == expected == "lines"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "sdpa"), ("bfloat16", FLOAT32_SDPA)])
def test_a_student_that_trains_in_bfloat16_on_a_cpu_attends_so(
    tiny_run: Any, tiny_models: Path, dtype: str, expected: str
) -> None:
    student = tiny_run.config.student.model_copy(update={"dtype": dtype})
    config = tiny_run.config.model_copy(update={"student": student})
    run = replace(tiny_run, resolved=replace(tiny_run.resolved, config=config))
    made = trainable_student(run, tiny_models, torch.device("cpu"), ALONE).model
    assert made.config._attn_implementation == expected
    assert made.dtype == torch.float32


def test_other_attention_is_left_alone() -> None:
    model = make()
    model.set_attn_implementation("eager")
    attend_in_float32(model)
    assert model.config._attn_implementation == "eager"


def test_masks_can_be_given_to_it_and_no_file_names_it(tmp_path: Path) -> None:
    model = make()
    attend_in_float32(model)
    with masked_attention(model):
        assert model.config._attn_implementation == FLOAT32_SDPA
    model.save_pretrained(tmp_path)
    assert FLOAT32_SDPA not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_float_masks_are_taken() -> None:
    model = make()
    attend_in_float32(model)
    mask = torch.full((12, 12), -torch.inf).triu(1).to(BF16).expand(2, 1, 12, 12)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        found = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        expected = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
