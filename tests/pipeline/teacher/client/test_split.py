"""Cutting a step into requests."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import INFO, request

from tropd.pipeline.teacher.client.split import split_request


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=0, max_size=40),
    st.integers(1, 6),
    st.sampled_from([40, 100, 10_000]),
)
def test_every_sequence_is_in_one_part_within_the_limits_and_the_parts_are_about_equal(
    lengths: list[int], servers: int, most: int
) -> None:
    asked = request(*lengths)
    parts = split_request(
        asked, INFO.model_copy(update={"max_request_tokens": most}), servers=servers, where="here"
    )
    assert [item.seed for part in parts for item in part.sequences] == [i.seed for i in asked.sequences]
    sizes = [sum(len(item.tokens) for item in part.sequences) for part in parts]
    assert all(0 < size <= most for size in sizes)
    if most == 10_000:
        assert len(parts) <= servers
        assert all(abs(size - sum(lengths) / servers) <= max(lengths) for size in sizes)
