"""The training pass shows before the first step that its log-probs are those of plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_runs import TINY
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from tropd.pipeline.training.update.student import StudentPass
from tropd.pipeline.training.update.trainer_proof import prove_pass
from tropd.storage.errors import ConfigError

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]


def test_packed_and_padded_rows_are_tried(tiny_model: Any) -> None:
    passes = StudentPass(tiny_model)
    assert passes.packing == "lines"
    prove_pass(passes, tiny_model, ROWS)
    prove_pass(StudentPass(tiny_model, torch.bfloat16), tiny_model, ROWS)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3))
    prove_pass(StudentPass(gpt2.eval()), gpt2, ROWS)


def test_rows_that_see_each_other_are_refused(tiny_model: Any) -> None:
    passes = StudentPass(tiny_model)
    hidden = passes.split.hidden

    def blind(**inputs: Any) -> Any:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        return hidden(**inputs)

    object.__setattr__(passes.split, "hidden", blind)
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM: log-probs of scored tokens differ"):
        prove_pass(passes, tiny_model, ROWS)


def test_a_model_that_looks_ahead_is_not_trained() -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**TINY, is_decoder=False)).eval()
    with pytest.raises(ConfigError, match="BertLMHeadModel: log-probs of scored tokens differ"):
        prove_pass(StudentPass(model), model, ROWS)
