"""Rows and generations come back from their arrays as they were."""

from __future__ import annotations

import numpy as np
import pytest

from tropd.pipeline.models.engines.base import Generation
from tropd.pipeline.models.engines.child.messages import Ragged, Written


@pytest.mark.parametrize("rows", [[], [[]], [[1, 2], [], [3]], [[], []]])
def test_rows_come_back(rows: list[list[int]]) -> None:
    assert [row.tolist() for row in Ragged.of(rows, np.int32).rows()] == rows


@pytest.mark.parametrize("drawn", [None, [-0.25, -4.0]])
def test_generations_come_back(drawn: list[float] | None) -> None:
    written = [Generation([5, 6], [-0.1, -2.0], "stop", drawn), Generation([], [], "length", drawn and [])]
    assert Written.of(written).generations() == written
    assert Written.of([]).generations() == []
