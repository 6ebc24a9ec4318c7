"""Attention within rows: packed rows get what each gets alone, with a mask or without, and so do their gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tropd.pipeline.models.attention import row_attention
from tropd.pipeline.models.attention.row_attention import ROW_ATTENTION, attend_in_rows, row_inputs
from tropd.pipeline.training.update import student as students
from tropd.pipeline.training.world import World

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma3": Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def packed(model: Any, lines: list[list[list[int]]]) -> list[torch.Tensor]:
    """Logits of rows that follow one another in lines of one width, by row."""
    width = max(sum(map(len, line)) for line in lines)
    ids, positions, lengths = [], [], []
    for line in lines:
        pad = width - sum(map(len, line))
        parts = [*line, *([[0] * pad] if pad else [])]
        ids.append([token for part in parts for token in part])
        positions.append([n for part in parts for n in range(len(part))])
        lengths += [len(part) for part in parts]
    logits = model(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        use_cache=False,
        **row_inputs(lengths, torch.device("cpu")),
    ).logits
    found = []
    for number, line in enumerate(lines):
        begin = 0
        for row in line:
            found.append(logits[number, begin : begin + len(row)])
            begin += len(row)
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lines", [[ROWS], [ROWS[:1], ROWS[1:]], [[row] for row in ROWS]])
def test_packed_rows_get_what_each_gets_alone(name: str, lines: list[list[list[int]]]) -> None:
    model = make(CONFIGS[name])
    expected = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]
    assert attend_in_rows(model)
    assert model.config._attn_implementation == ROW_ATTENTION
    found = packed(model, lines)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_rows_alone() -> None:
    plain, rows = make(CONFIGS["gemma3"]), make(CONFIGS["gemma3"])
    sum(plain(input_ids=torch.tensor([row])).logits.square().sum() for row in ROWS).backward()
    assert attend_in_rows(rows)
    sum(logits.square().sum() for logits in packed(rows, [ROWS])).backward()  # type: ignore[union-attr]
    for one, other in zip(rows.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_without_rows_a_line_is_one() -> None:
    model = make(CONFIGS["mistral"])
    ids = torch.tensor([ROWS[0], ROWS[0][::-1]])
    expected = model(input_ids=ids, use_cache=False).logits
    attend_in_rows(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_models_with_more_than_rows_keep_their_attention() -> None:
    capped = make(Gemma2Config(**SMALL, attn_logit_softcapping=50.0))
    assert not attend_in_rows(capped)
    eager = make(CONFIGS["llama"])
    eager.set_attn_implementation("eager")
    assert not attend_in_rows(eager)
    assert eager.config._attn_implementation == "eager"


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is taken: padding would have to be in it."""
    model = make(CONFIGS["llama"])
    attend_in_rows(model)
    masks = []
    attend = row_attention.scaled_dot_product_attention

    def watched(*parts: Any, attn_mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return attend(*parts, attn_mask=attn_mask, **options)

    monkeypatch.setattr(row_attention, "scaled_dot_product_attention", watched)
    packed(model, [ROWS])
    assert len(masks) == 2 * len(ROWS)
    assert set(masks) == {None}
    with pytest.raises(ValueError, match="takes no mask"):
        row_attention.attend_rows(torch.nn.Identity(), *[torch.ones(1, 1, 1, 1)] * 3, torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_asked_in_its_own_terms(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """On a GPU; a stand-in for the kernel has its arguments and its meaning, as its documentation gives them."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8, dtype=torch.bfloat16)
    key, value = (torch.randn(2, 2, 6, 8, dtype=torch.bfloat16) for _ in range(2))
    rows = row_inputs([4, 2, 1, 5], torch.device("cpu"))
    expected, _ = row_attention.attend_rows(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window, **rows
    )
    asked = []

    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: torch.Tensor,
        bounds_k: torch.Tensor,
        longest: int,
        longest_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        asked.append((longest, longest_k, window_size, enable_gqa))
        assert bounds is bounds_k
        assert bounds.dtype == torch.int32
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        row = torch.searchsorted(bounds, torch.arange(len(q)), right=True)
        behind = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
        left = len(q) if window_size[0] < 0 else window_size[0]
        seen = (row[:, None] == row[None]) & (behind >= -window_size[1]) & (behind <= left)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    found, _ = row_attention.attend_rows(
        torch.nn.Identity(),
        query.as_subclass(OnGpu),
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        **rows,
    )
    assert asked == [(5, 5, (-1 if window is None else window - 1, 0), True)]
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_student_in_half_precision_on_a_gpu_attends_so(
    tiny_run: Any, tiny_models: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several processes too: none has masks that grow with the square of a line."""
    monkeypatch.setattr(students, "pick_device", lambda _: torch.device("cuda"))
    chosen = tiny_run.config.student.model_copy(update={"dtype": "bfloat16"})
    config = tiny_run.config.model_copy(update={"student": chosen})
    run = replace(tiny_run, resolved=replace(tiny_run.resolved, config=config))
    made = students.trainable_student(run, tiny_models, torch.device("cpu"), World(size=processes)).model
    assert made.config._attn_implementation == ROW_ATTENTION
