"""Flash attention in training, as far as that goes without a GPU.

``like_flash`` has what sets flash attention apart: no mask is made for it, and it finds rows that follow one another by
their positions, but only where there is one line. The arithmetic is PyTorch's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.models.attention.row_attention import attend_in_rows
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.runtime import masked_attention
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.signal.ask_teacher import TeacherData, draw_regions
from tropd.pipeline.training.update import student as updating
from tropd.pipeline.training.update.gradients import StepInputs, StepOutcome, backpropagate
from tropd.pipeline.training.update.micro_batches import Layout, micro_batches
from tropd.pipeline.training.update.student import StudentPass, choose_attention
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError

NAME = "varlen_in_tests"  # transformers looks for a kernel behind every name with "flash" in it


def like_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    calls.append(tuple(query.shape[:3:2]))
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    assert attention_mask is None, "flash attention takes no mask of rows that are all there"
    width = query.shape[2]
    begins = [0]
    if query.shape[0] == 1 and position_ids is not None:
        begins = (position_ids[0] == 0).nonzero().flatten().tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for begin, end in zip(begins, [*begins[1:], width], strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


calls: list[tuple[int, int]] = []


@pytest.fixture
def student(tiny_model: Any) -> Iterator[Any]:
    AttentionInterface.register(NAME, like_flash)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(NAME)
    calls.clear()
    yield model
    model.set_attn_implementation("sdpa")


def rows(count: int) -> list[Row]:
    generator = np.random.default_rng(0)
    found = []
    for i in range(count):
        prompt, tokens = (generator.integers(2, 24, size=n).tolist() for n in (2 + i % 3, 1 + i % 7))
        plan = RowPlan(i, i, prompt, [], None, False, seed=i)
        found.append(Row(plan, tokens, generator.uniform(-3, -0.1, len(tokens)).tolist(), truncated=False))
    return found


def gradient(
    model: Any, budget: int, precision: torch.dtype | None = torch.bfloat16
) -> tuple[StepOutcome, torch.Tensor]:
    objective = load_objective("opd", {})
    step = rows(12)
    total = sum(len(row.tokens) for row in step)
    teacher = TeacherData(
        np.random.default_rng(1).uniform(-3, -0.1, total).astype(np.float32),
        None,
        TeacherData.nothing().topk,
    )
    inputs = StepInputs(step, teacher, draw_regions(objective, step, teacher), None, None, 0.1)
    model.zero_grad(set_to_none=True)
    parameters = list(model.parameters())
    passes = StudentPass(model, precision)
    calls.clear()  # without those by which it has found how to pack
    outcome = backpropagate(passes, parameters, objective, inputs, micro_batch_tokens=budget)
    return outcome, torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])


@pytest.mark.parametrize("budget", [25, 10_000])
def test_rows_in_one_line_teach_what_padded_ones_do(student: Any, tiny_model: Any, budget: int) -> None:
    assert StudentPass(student).packing == "padded"
    assert StudentPass(student, torch.bfloat16).packing == "one line"
    outcome, found = gradient(student, budget)
    assert {lines for lines, _ in calls} == {1}
    assert max(width for _, width in calls) <= max(budget, 11)
    expected, reference = gradient(copy.deepcopy(tiny_model), 10_000)
    assert torch.nn.functional.cosine_similarity(found, reference, dim=0) > 0.999
    assert np.allclose(outcome.student_logprobs, expected.student_logprobs, atol=0.05)


@pytest.mark.parametrize("budget", [25, 10_000])
def test_attention_within_rows_teaches_what_masks_do(tiny_model: Any, budget: int) -> None:
    within = copy.deepcopy(tiny_model)
    assert attend_in_rows(within)
    assert StudentPass(within).packing == "one line"
    found, expected = (gradient(model, budget, None) for model in (within, copy.deepcopy(tiny_model)))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert np.allclose(found[0].student_logprobs, expected[0].student_logprobs, atol=1e-5)


def test_attention_within_rows_that_mixes_rows_is_given_up(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as of a model that does not hand the rows to its attention."""
    within = copy.deepcopy(tiny_model)
    assert attend_in_rows(within)
    monkeypatch.setattr(updating, "row_inputs", lambda lengths, device: {})
    passes = StudentPass(within)
    assert not passes.in_rows
    assert passes.packing == StudentPass(copy.deepcopy(tiny_model)).packing


def test_one_line_has_no_padding() -> None:
    step = rows(12)
    batches = list(micro_batches(Layout(step, False), 30, torch.device("cpu"), packing="one line"))
    assert sum(batch.inputs["input_ids"].numel() for batch in batches) == sum(len(r.sequence) for r in step)
    assert all(batch.inputs["input_ids"].shape[0] == 1 for batch in batches)
    assert sorted(int(n) for batch in batches for n in batch.student_tokens) == list(
        range(sum(len(row.tokens) for row in step))
    )


def test_sampling_and_scoring_have_masks_all_the_same(student: Any, tiny_model: Any) -> None:
    """They decode from a cache and pad."""
    options: dict[str, Any] = {"seeds": [0, 1], "max_tokens": [6, 9]}
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10]]
    engine, plain = TransformersEngine(student, [1]), TransformersEngine(copy.deepcopy(tiny_model), [1])
    calls.clear()
    one, other = (e.generate(prompts, Sampling(0.0), **options) for e in (engine, plain))
    assert [g.tokens for g in one] == [g.tokens for g in other]
    a, b = (e.score([[3, 4, 5, 6], [6, 7]], [1, 1]) for e in (engine, plain))
    assert all(np.allclose(x.token_logprobs, y.token_logprobs, atol=1e-6) for x, y in zip(a, b, strict=True))
    assert not calls
    assert student.config._attn_implementation == NAME
    with masked_attention(student):
        assert student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "device", "processes"),
    [("float32", "cuda", 1), ("bfloat16", "cpu", 1), ("bfloat16", "cuda", 2)],
)
def test_flash_attention_is_refused_where_it_cannot_be(
    student: Any, dtype: str, device: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = SimpleNamespace(
        train=SimpleNamespace(attention="flash_attention_2"),
        runtime=SimpleNamespace(device=device),
        student=SimpleNamespace(settled_dtype=dtype),
    )
    with pytest.raises(ConfigError, match=r"flash_attention_2.*needs a CUDA GPU") as caught:
        choose_attention(student, cast(Run, SimpleNamespace(config=config)), World(size=processes))
    assert "train.attention" in str(caught.value.hint)
    config.student.settled_dtype, config.runtime.device = "bfloat16", "cuda"
    with pytest.raises(ConfigError, match="needs a package that is not installed"):
        choose_attention(student, cast(Run, SimpleNamespace(config=config)), World())
