"""An engine shows at its first call that its log-probs are those of plain forward passes, or refuses the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import TINY

from tropd.pipeline.models.engines import proof
from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.decoding_any import ModelDecoder
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.storage.errors import ConfigError

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [4, 4, 9, 30, 31, 32, 33, 34]]
RECURRENT = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}


def make(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**options)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def generate(model: Any, **options: Any) -> list[Any]:
    engine = TransformersEngine(model, [3], **options)
    return engine.generate(PROMPTS, Sampling(0.0), seeds=[0, 1, 2], max_tokens=[10] * 3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mamba", {"state_size": 8}),
        ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    ],
)
def test_state_space_models_sample_what_they_would_by_themselves(kind: str, options: dict[str, Any]) -> None:
    model = make(kind, **RECURRENT, **options)
    for prompt, own in zip(PROMPTS, generate(model), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=3, pad_token_id=0)
        assert own.tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Rwkv", RECURRENT | {"context_length": 128}),
        ("RecurrentGemma", TINY | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}),
    ],
)
def test_models_whose_state_is_not_in_the_cache_are_refused_before_they_sample(
    kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{kind}ForCausalLM: log-probs of sampled tokens differ") as caught:
        generate(make(kind, **options))
    assert "rounding explains 0.001" in caught.value.message
    assert "docs/models.md" in str(caught.value.hint)


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Its scores are those of its forward pass, but of no model that could have sampled."""
    config = transformers.BertConfig(**TINY, is_decoder=False)
    torch.manual_seed(0)
    engine = TransformersEngine(transformers.BertLMHeadModel(config).eval(), [3])
    with pytest.raises(ConfigError, match="BertLMHeadModel: log-probs of scored tokens differ"):
        engine.score(PROMPTS, [2, 2, 2])


@pytest.mark.parametrize("kind", ["Qwen3", "GPTNeoX"], ids=["lean", "transformers"])
@pytest.mark.parametrize("wrong", ["positions", "padding", "cache"])
def test_a_decoder_with_a_mistake_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str, wrong: str) -> None:
    decoder: Any = LeanDecoder if kind == "Qwen3" else ModelDecoder
    start = decoder.start

    def mistaken(self: Any, *arguments: Any) -> Any:
        choice = start(self, *arguments)
        if wrong == "positions":
            self._next = self._next + 1
        elif wrong == "cache":
            layers = self._cache if decoder is LeanDecoder else [x.keys for x in self._cache.layers]
            layers[0].zero_()
        elif decoder is LeanDecoder:
            self._allowed = None
        else:
            self._mask = torch.ones_like(self._mask)
        return choice

    model = make(kind, **TINY)
    assert generate(model) == generate(model)
    engine = TransformersEngine(model, [3])
    assert engine.is_lean == (decoder is LeanDecoder)
    monkeypatch.setattr(decoder, "start", mistaken)
    with pytest.raises(ConfigError, match="log-probs of sampled tokens differ"):
        engine.generate(PROMPTS, Sampling(0.0), seeds=[0, 1, 2], max_tokens=[10] * 3)


def test_rounding_is_no_reason_to_refuse() -> None:
    model = make("Qwen3", **TINY).to(torch.bfloat16)
    assert len(generate(model)) == 3
    other = make("GPTNeoX", **TINY).to(torch.bfloat16)
    assert len(generate(other)) == 3
    TransformersEngine(other, [3]).score(PROMPTS, [1, 1, 1])
    assert len(generate(make("GPTNeoX", **TINY), autocast=torch.bfloat16)) == 3


def test_an_engine_proves_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("check_decoding", "require_equal_scores"):
        original = getattr(proof, name)

        def noted(*arguments: Any, name: str = name, original: Any = original) -> None:
            seen.append(name)
            original(*arguments)

        monkeypatch.setattr(proof, name, noted)
    engine = TransformersEngine(make("Qwen3", **TINY), [3])
    for _ in range(2):
        engine.generate(PROMPTS, Sampling(), seeds=[0, 1, 2], max_tokens=[3] * 3)
        engine.score(PROMPTS, [1, 1, 1])
    assert seen == ["check_decoding", "check_decoding", "require_equal_scores"]


def test_what_is_sampled_does_not_depend_on_the_proof() -> None:
    engine = TransformersEngine(make("GPTNeoX", **TINY), [3])
    first, later = (
        engine.generate(PROMPTS, Sampling(), seeds=[0, 1, 2], max_tokens=[10] * 3) for _ in range(2)
    )
    assert first == later  # only the first call has proved anything before


def test_few_rows_are_enough_to_need_padding() -> None:
    assert proof.few([[1, 2, 3]]) == [[1, 2, 3], [1, 2]]
    assert proof.few([[1], [2, 3], [4]]) == [[1], [1], [2, 3]]
    long = list(range(1000))
    assert [len(row) for row in proof.few([long, long])] == [96, 48, 96]
    assert [len(row) for row in proof.few([long], 10)] == [10, 5]
    assert proof.few([[1, 2]], -3) == [[1], [1]]


def test_numbers_that_are_none_are_left_to_who_uses_them() -> None:
    def found(*_: Any) -> list[Any]:
        return [np.array([np.nan, -1.0], dtype=np.float32)]

    proof.check_decoding("a model", [[1]], [[2, 3]], [[float("nan"), -1.0]], found, 1e-3)
    with pytest.raises(ConfigError, match="up to nan"):
        proof.check_decoding("a model", [[1]], [[2, 3]], [[-1.0, -1.0]], found, 1e-3)


def test_a_failure_is_a_refusal_unless_memory_is_short() -> None:
    with (
        pytest.raises(ConfigError, match="a model cannot be run by this engine: no such mask"),
        proof.refusing("a model"),
    ):
        raise RuntimeError("no such mask\nsecond line")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), proof.refusing("a model"):
            raise error
