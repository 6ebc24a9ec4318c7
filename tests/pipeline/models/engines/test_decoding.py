"""Batches from which rows leave as they are done: the same responses, whoever is beside them, and never too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tropd.pipeline.models.engines import decoding
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.decoding import ChosenTokens, batch_sizes, decode, few_moved
from tropd.pipeline.models.engines.lean import lean_decoder
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output.output_layer import SplitModel

LONGEST = 24


def short_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "lean":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            vocab_size=30, num_key_value_heads=2, max_position_embeddings=LONGEST, **sizes
        )
        return transformers.LlamaForCausalLM(config).eval()
    # Its positions are a table: one beyond the last is an error.
    config = transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=LONGEST)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["lean", "gpt2"])
def test_a_row_that_is_done_early_never_leaves_the_models_positions(kind: str) -> None:
    engine = TransformersEngine(short_model(kind), [], batch_size=64)
    assert engine.is_lean == (kind == "lean")
    # One of 21 is too few to leave: it rides along while the others are written to the end.
    prompts = [[5] * (LONGEST - 2)] + [[3 + n] for n in range(20)]
    results = engine.generate(prompts, Sampling(0.0), seeds=[0] * 21, max_tokens=[100] * 21)
    assert [len(r.tokens) for r in results] == [2] + [LONGEST - 1] * 20
    alone = [engine.generate([p], Sampling(0.0), seeds=[0], max_tokens=[100])[0] for p in prompts]
    assert [r.tokens for r in results] == [r.tokens for r in alone]


@pytest.mark.parametrize("kind", ["lean", "gpt2"])
def test_a_prompt_that_fills_the_context_gets_no_token(kind: str) -> None:
    engine = TransformersEngine(short_model(kind), [], batch_size=64)
    full, other = [4] * LONGEST, [4, 5]
    results = engine.generate([full, other], Sampling(), seeds=[0, 1], max_tokens=[3, 3])
    assert [(len(r.tokens), r.finish_reason) for r in results] == [(0, "length"), (3, "length")]
    (only,) = engine.generate([full], Sampling(), seeds=[0], max_tokens=[3])
    assert only.tokens == []


@pytest.mark.parametrize("kind", ["lean", "gpt2"])
def test_responses_do_not_depend_on_when_rows_leave(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    engine = TransformersEngine(short_model(kind), [1, 7], batch_size=64)
    prompts = [[2 + n % 20] * (1 + n % 5) for n in range(40)]
    limits = [1 + n % 17 for n in range(40)]

    def generate() -> Any:
        return engine.generate(prompts, Sampling(), seeds=range(40), max_tokens=limits)

    expected = generate()
    assert {r.finish_reason for r in expected} == {"stop", "length"}
    for share, segment in ((0.0, 3), (0.5, 1), (1.0, 128)):
        monkeypatch.setattr(decoding, "DONE_SHARE", share)
        monkeypatch.setattr(decoding, "SEGMENT", segment)
        for one, other in zip(generate(), expected, strict=True):
            assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_rows_are_told_of_when_they_are_done_while_others_are_written() -> None:
    class Counting:
        """Writes token 3 in every row, and counts its steps."""

        def __init__(self) -> None:
            self.steps = self.rows = 0

        def start(self, prompts: Sequence[Sequence[int]], room: int, draws: torch.Tensor) -> ChosenTokens:
            self.rows = len(prompts)
            return self.step(draws)

        def step(self, draws: torch.Tensor) -> ChosenTokens:
            self.steps += 1
            zeros = torch.zeros(self.rows)
            return torch.full((self.rows,), 3), zeros, zeros

        def select(self, keep: torch.Tensor) -> None:
            self.rows = len(keep)

    decoder, limits = Counting(), [1, 9, 17, 5]
    told: list[Any] = []
    found = decode(
        decoder,
        [[2]] * 4,
        seeds=range(4),
        limits=limits,
        stop_ids=[],
        device=torch.device("cpu"),
        finished=lambda row, generation: told.append((row, decoder.steps, generation)),
    )
    assert told == [(row, limits[row], found[row]) for row in (0, 3, 1, 2)]


def test_an_engine_tells_of_every_row_under_its_own_number() -> None:
    engine = TransformersEngine(short_model("lean"), [1, 7], batch_size=3)
    asked: dict[str, Any] = {"seeds": range(7), "max_tokens": [1, 9, 17, 5, 1, 2, 3]}
    prompts, told = [[2 + n] for n in range(7)], []
    expected = engine.generate(prompts, Sampling(), **asked)
    found = engine.generate(prompts, Sampling(), **asked, finished=lambda *one: told.append(one))
    assert found == expected
    assert sorted(told, key=lambda one: one[0]) == list(enumerate(expected))


@pytest.mark.parametrize("lean", [True, False])
def test_prompts_are_read_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch, lean: bool) -> None:
    """The activations of a whole batch of long prefixes would not fit."""
    model, read = short_model("lean"), []
    next_logits, hidden = lean_decoder.next_logits, SplitModel.next_logits

    def counted(*arguments: Any) -> torch.Tensor:
        read.append(arguments[2].numel())
        return next_logits(*arguments)

    def counted_too(self: SplitModel, **inputs: Any) -> torch.Tensor:
        read.append(inputs["input_ids"].numel())
        return hidden(self, **inputs)

    monkeypatch.setattr(lean_decoder, "next_logits", counted)
    monkeypatch.setattr(SplitModel, "next_logits", counted_too)
    prompts = [[2 + n] * (3 + 4 * n) for n in range(5)]

    def generate(tokens: int) -> tuple[Any, int]:
        engine = TransformersEngine(model, [], batch_tokens=tokens, lean=lean)
        engine.generate(prompts[:1], Sampling(), seeds=[0], max_tokens=[1])  # it proves itself
        read.clear()
        return engine.generate(prompts, Sampling(), seeds=range(5), max_tokens=[5] * 5), max(read)

    expected, whole = generate(1000)
    found, largest = generate(20)
    assert (whole, largest) == (5 * 19, 20)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_gpu_gets_no_batch_of_a_few_rows() -> None:
    """Its steps would take as long as those of a full one."""
    gpu = torch.device("cuda")
    assert batch_sizes(73, 64, gpu) == [73]
    assert batch_sizes(81, 64, gpu) == [41, 40]
    assert batch_sizes(512, 64, gpu) == [74, 73, 73, 73, 73, 73, 73]
    assert batch_sizes(1, 64, gpu) == [1]
    assert batch_sizes(0, 64, gpu) == []
    assert batch_sizes(73, 64, torch.device("cpu")) == [64, 9]


def test_rows_leave_caches_of_linear_attention_too() -> None:
    sizes = {
        "vocab_size": 30,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "num_key_value_heads": 2}
    dims = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "max_position_embeddings": 64}
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(**sizes, **heads, **dims, **experts)
    engine = TransformersEngine(transformers.Qwen3NextForCausalLM(config).eval(), [3], batch_size=9)
    prompts, limits = [[4 + n] * (1 + n % 4) for n in range(9)], [2 + 3 * n for n in range(9)]
    together = engine.generate(prompts, Sampling(), seeds=range(9), max_tokens=limits)
    for n, found in enumerate(together):
        (alone,) = engine.generate([prompts[n]], Sampling(), seeds=[n], max_tokens=[limits[n]])
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-5)


class Counting:
    """A decoder of nothing: the token that it chooses is the number of the row's prompt."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._rows = torch.zeros(0, dtype=torch.long)

    def start(self, prompts: Sequence[Sequence[int]], room: int, draws: torch.Tensor) -> ChosenTokens:
        self._rows = torch.tensor([prompt[0] for prompt in prompts])
        return self.step(draws)

    def step(self, draws: torch.Tensor) -> ChosenTokens:
        assert draws.shape == self._rows.shape
        self.sizes.append(len(draws))
        return self._rows, draws.float(), draws.float()

    def select(self, keep: torch.Tensor) -> None:
        self._rows = self._rows[keep]


@pytest.mark.parametrize("longest", [0, 1, 7])
def test_the_last_row_goes_on_with_one_other(longest: int) -> None:
    limits = [2] * 8
    limits[longest] = 300  # more than two segments
    decoder = Counting()
    found = decode(
        decoder,
        [[10 + n] for n in range(8)],
        seeds=range(8),
        limits=limits,
        stop_ids=[],
        device=torch.device("cpu"),
    )
    assert [g.tokens for g in found] == [[10 + n] * limit for n, limit in enumerate(limits)]
    assert decoder.sizes == [8] * 2 + [2] * 298
    (alone,) = decode(decoder, [[5]], seeds=[longest], limits=[300], stop_ids=[], device=torch.device("cpu"))
    assert alone.logprobs == found[longest].logprobs


@given(st.sets(st.integers(0, 30), min_size=1))
def test_as_few_rows_move_as_leave(places: set[int]) -> None:
    going = np.array(sorted(places))
    order = few_moved(going)
    assert sorted(order.tolist()) == going.tolist()
    moved = np.flatnonzero(order != np.arange(len(order)))
    assert len(moved) == sum(place >= len(going) for place in places)
    # What is moved comes from beyond the new batch: copies cannot overwrite each other's sources.
    assert (order[moved] >= len(order)).all()
