"""Two thousand malformed requests; ``make bench-service`` sends ten thousand others."""

from __future__ import annotations

from typing import Any

from fuzz import BODIES, fuzz


def test_every_malformed_request_is_refused_and_good_ones_are_answered_all_the_while(
    table_engine: Any,
) -> None:
    refused = fuzz(table_engine, 2000, seed=0, expected=table_engine.expected)
    kinds = {name.split(":")[0] for name in refused}
    assert kinds == {make.__name__ for make in BODIES} | {"wrong content type", "too large"}
    assert {name.split(": ")[1] for name in refused} == {"422", "415", "413"}
    assert refused.total() == 2000
    assert len(table_engine.calls) < 250  # the good ones, and changed bytes that happen to be valid
