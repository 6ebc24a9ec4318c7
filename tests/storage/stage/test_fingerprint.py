"""Fingerprints: stable, order-free, and every difference has a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tropd.storage.stage.fingerprint import Fingerprint, flatten

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
fields = st.dictionaries(st.sampled_from("abcde"), scalars)


@given(fields, fields)
def test_digests_differ_exactly_if_a_field_does(one: dict, other: dict) -> None:
    first, second = Fingerprint(one), Fingerprint(other)
    assert (first.digest == second.digest) == (second.changes_from(first.fields) == [])


@given(fields)
def test_order_does_not_matter(values: dict) -> None:
    assert Fingerprint(values).digest == Fingerprint(dict(reversed(values.items()))).digest


def test_digest_is_pinned() -> None:
    """A change here makes every existing workspace refuse to resume."""
    digest = Fingerprint({"seed": 1, "sampling.temperature": 0.7, "model": "ab", "filter": None}).digest
    assert digest == "8b066355748b05b4295d385000ae5553e0c91dfee7d3f20ab92df11190e8e3af"


def test_changes_name_absent_and_equal_looking_values() -> None:
    changes = Fingerprint({"a": 1, "b": True, "new": None}).changes_from({"a": 1.0, "b": 1, "gone": 2})
    assert changes == [("a", 1.0, 1), ("b", 1, True), ("gone", 2, None), ("new", None, None)]


def test_flatten() -> None:
    nested = {"a": {"b": 1, "c": [1, {"y": 2, "x": 1}]}, "d": None, "e": {}}
    assert flatten("", nested) == {"a.b": 1, "a.c": '[1, {"x": 1, "y": 2}]', "d": None, "e": "{}"}
    assert flatten("config", {"a": True}) == {"config.a": True}
    assert flatten("", {}) == {}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"a": object()}, TypeError, "cannot fingerprint x.a: object"),
        ({"a": [object()]}, TypeError, "cannot fingerprint x.a"),
        ({"a.b": 1, "a": {"b": 2}}, ValueError, "x.a.b"),
    ],
)
def test_flatten_refuses(value: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flatten("x", value)
