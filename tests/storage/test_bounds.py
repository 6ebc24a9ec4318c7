"""What may be a log-prob."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tropd.storage.bounds import are_logprobs


@pytest.mark.parametrize("values", [[], [0.0, -3.5], [-math.inf], [5e-4]])
def test_logprobs(values: list[float]) -> None:
    assert are_logprobs(values)
    assert are_logprobs(np.array(values, dtype=np.float16))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.1, 2e-3])
def test_what_is_none(wrong: float) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        assert not are_logprobs(np.array([-1.0, wrong], dtype=dtype))
