"""Logits in float32 where vLLM can give them, and nothing asked of it that it would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.models.output.vllm_head import head_overrides

FLOAT32 = {"head_dtype": "float32"}


@pytest.mark.parametrize(
    ("config", "dtype", "quantization", "on_gpu", "expected"),
    [
        ({}, "bfloat16", None, True, FLOAT32),
        ({"quantization_config": None}, "bfloat16", None, True, FLOAT32),
        ({}, "float32", None, True, {}),  # they are
        ({}, "bfloat16", None, False, {}),  # a CPU would convert the whole layer for every token
        ({}, "bfloat16", "fp8", True, {}),
        ({"quantization_config": {"quant_method": "awq"}}, "bfloat16", None, True, {}),
    ],
)
def test_logits_are_in_float32_where_vllm_rounds_them_and_need_not(
    config: dict[str, Any], dtype: Any, quantization: str | None, on_gpu: bool, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert head_overrides(tmp_path, dtype, quantization, on_gpu=on_gpu) == expected
