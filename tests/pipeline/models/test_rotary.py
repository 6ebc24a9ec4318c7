"""Rotary positions whose angles depend on the longest row of a batch: sequences end before they change."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TINY, make_run
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
)

from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import context_length, rotary_switch
from tropd.pipeline.run.opening import role_room
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.storage.errors import ConfigError

DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


def dynamic() -> Any:
    return LlamaConfig(**TINY, rope_parameters=dict(DYNAMIC))


def long() -> Any:
    options = TINY | {"original_max_position_embeddings": 16, "pad_token_id": 0}
    return Phi3Config(**options, rope_parameters=LONG | {"original_max_position_embeddings": 16})


@pytest.mark.parametrize(("config", "kind"), [(dynamic(), LlamaForCausalLM), (long(), Phi3ForCausalLM)])
def test_a_rows_logprobs_do_not_depend_on_the_rows_beside_it(config: Any, kind: Any) -> None:
    torch.manual_seed(0)
    engine = TransformersEngine(kind(config).eval(), [3])
    assert engine.max_length == 16
    short, longest = list(range(4, 12)), list(range(4, 20))
    alone, _ = (engine.score(rows, [1] * len(rows))[0] for rows in ([short], [short, longest]))
    beside = engine.score([short, longest], [1, 1])[0]
    np.testing.assert_allclose(alone.token_logprobs, beside.token_logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens, the model takes 16"):
        engine.score([short, [*longest, 4]], [1, 1])


def test_other_scalings_do_not_end_sooner() -> None:
    for config in (
        Qwen3Config(**TINY),
        Qwen3Config(**TINY, rope_parameters=DYNAMIC | {"rope_type": "yarn"}),
        Gemma3TextConfig(**TINY),  # parameters for each type of layer
    ):
        assert rotary_switch(config) is None
        assert context_length(config) == 128
    by_layer = {"full_attention": dict(DYNAMIC), "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(rope_parameters=by_layer, max_position_embeddings=128)
    config.get_text_config = lambda: config
    assert context_length(config) == 16
    assert context_length(SimpleNamespace(get_text_config=SimpleNamespace)) == 2**31 - 1


def test_a_run_is_told_and_refuses_responses_that_would_cross_over(tmp_path: Path) -> None:
    models = tmp_path / "models"
    config = dynamic()
    config.vocab_size = len(make_tokenizer())
    LlamaForCausalLM(config).save_pretrained(models)
    make_tokenizer().save_pretrained(models)
    run = make_run(tmp_path / "run", models)
    told: list[str] = []
    run = replace(run, reporter=SimpleNamespace(warning=told.append))  # type: ignore[arg-type]
    assert role_room(run, "student") == 16
    assert len(told) == 1
    assert "student.model takes 128 tokens, but here its sequences end at 16" in told[0]
    shutil.rmtree(tmp_path / "run")
    long_run: Run = make_run(tmp_path / "run", models)
    rollout = long_run.config.rollout.model_copy(update={"max_tokens": 16})
    changed = long_run.config.model_copy(update={"rollout": rollout})
    long_run = replace(long_run, resolved=replace(long_run.resolved, config=changed))
    with pytest.raises(
        ConfigError, match="responses of 16 tokens leave no room for a prompt: the model takes 16"
    ):
        generate_prefixes(long_run)
