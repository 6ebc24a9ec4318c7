"""The cache's encodings against their definition, token by token, and against their error bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import distributions

from tropd.storage.cache import topk_encoding
from tropd.storage.cache.shard import TopK, prune
from tropd.storage.cache.topk_encoding import (
    FILL,
    LEVELS,
    MAX_RELATIVE_ERROR,
    Precision,
    decode_topk,
    encode_topk,
)

PRECISIONS: tuple[Precision, ...] = ("float16", "q8")
cases = given(
    tokens=st.integers(0, 40),
    k=st.integers(1, 40),
    mass=st.sampled_from([0.5, 0.99, 0.999, 1.0]),
    seed=st.integers(0, 10_000),
)


def sample(tokens: int, k: int, mass: float, seed: int) -> tuple[TopK, np.ndarray]:
    full = distributions(np.random.default_rng(seed), tokens)
    order = np.argsort(-full, axis=1, kind="stable")[:, :k].astype(np.int32)
    logprobs = np.take_along_axis(full, order, axis=1)
    return prune(order, logprobs, full[:, 3], [tokens], mass=mass), full


def stored(data: TopK, precision: Precision) -> dict[str, np.ndarray]:
    return encode_topk(data.counts, data.ids, data.logprobs, data.tail, data.teacher_logprobs, precision)


def naive_decode(counts: np.ndarray, arrays: dict, precision: Precision) -> tuple[list[int], list[float]]:
    """The definition in loops: add gaps up, look levels up, rescale, sort."""
    ids: list[int] = []
    logprobs: list[float] = []
    position = 0
    for token, count in enumerate(counts):
        current, alternatives = 0, []
        for _ in range(count):
            current += int(arrays["id_gaps"][position])
            code = int(arrays["ceilings"][token]) - int(arrays["codes"][position])
            if precision == "float16":
                value = -float(np.uint16(code).view(np.float16))
            else:
                value = -0.01 * math.expm1(code * math.log(20.0 / 0.01 + 1.0) / 254)
            alternatives.append((code, current, value))
            position += 1
        if precision == "q8" and count:
            left = 1.0 - math.exp(float(arrays["tail"][token]))
            shift = math.log(left / sum(math.exp(v) for _, _, v in alternatives)) if left > 0 else 0.0
            alternatives = [(c, i, float(np.float16(min(v + shift, 0.0)))) for c, i, v in alternatives]
        for _, identity, value in sorted(alternatives):
            ids.append(identity)
            logprobs.append(value)
    return ids, logprobs


@settings(max_examples=60, deadline=None)
@cases
def test_decode_matches_the_definition(tokens: int, k: int, mass: float, seed: int) -> None:
    data, _ = sample(tokens, k, mass, seed)
    for precision in PRECISIONS:
        arrays = stored(data, precision)
        decoded = decode_topk(data.counts, arrays, precision)
        ids, logprobs = naive_decode(data.counts, arrays, precision)
        assert decoded["ids"].tolist() == ids
        assert np.allclose(decoded["logprobs"].astype(float), logprobs, rtol=1e-3, atol=1e-7)


@settings(max_examples=60, deadline=None)
@cases
def test_float16_is_lossless(tokens: int, k: int, mass: float, seed: int) -> None:
    data, _ = sample(tokens, k, mass, seed)
    decoded = decode_topk(data.counts, stored(data, "float16"), "float16")
    for name, values in decoded.items():
        assert values.dtype == getattr(data, name).dtype
        assert np.array_equal(values, getattr(data, name)), name


@settings(max_examples=100, deadline=None)
@cases
def test_q8_errors_stay_within_the_documented_bounds(tokens: int, k: int, mass: float, seed: int) -> None:
    data, full = sample(tokens, k, mass, seed)
    decoded = decode_topk(data.counts, stored(data, "q8"), "q8")
    student = distributions(np.random.default_rng(seed + 1), tokens)
    starts = np.concatenate([[0], np.cumsum(data.counts, dtype=np.int64)])
    for token in range(tokens):
        part = slice(starts[token], starts[token + 1])
        exact = dict(zip(data.ids[part].tolist(), data.logprobs[part].astype(float).tolist(), strict=True))
        found = dict(
            zip(decoded["ids"][part].tolist(), decoded["logprobs"][part].astype(float).tolist(), strict=True)
        )
        assert exact.keys() == found.keys()
        total = sum(math.exp(v) for v in exact.values())
        entropy = -sum(math.exp(v) / total * (v - math.log(total)) for v in exact.values())
        for identity, value in exact.items():
            if value > -20.0:
                bound = 0.016 * (abs(value) + entropy + 0.02) + 0.001
                assert abs(found[identity] - value) <= bound
        mass_found = sum(math.exp(v) for v in found.values()) + math.exp(decoded["tail"][token])
        assert mass_found == pytest.approx(1.0, abs=2e-3)
        # The forward KL's sum over the alternatives, for what lies above the range of the levels.
        theirs = student[token].astype(float)
        above = {i: v for i, v in exact.items() if v > -20.0}
        d = max((abs(found[i] - v) for i, v in above.items()), default=0.0)
        error = sum(
            math.exp(found[i]) * (found[i] - theirs[i]) - math.exp(v) * (v - theirs[i])
            for i, v in above.items()
        )
        weight = sum(math.exp(v) * abs(v - theirs[i]) for i, v in above.items())
        assert abs(error) <= math.expm1(d) * weight + math.exp(d) * d + 1e-6
        assert abs(decoded["teacher_logprobs"][token] - full[token, 3]) <= abs(full[token, 3]) / 2048 + 1e-7


def test_q8_levels_have_the_documented_relative_error() -> None:
    assert 0.0149 < MAX_RELATIVE_ERROR < 0.015
    magnitudes = np.linspace(0.0, 20.0, 20_001).astype(np.float16)
    one = np.ones(len(magnitudes), np.uint16)
    codes = encode_topk(one, np.zeros(len(one), np.int32), -magnitudes, one * 0.0, one * 0.0, "q8")[
        "ceilings"
    ]
    levels = 0.01 * np.expm1(codes * math.log(2001.0) / 254)
    assert np.all(np.abs(levels - magnitudes) <= 0.0151 * magnitudes.astype(float) + 0.00016)
    assert codes.max() == LEVELS - 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fill_values_and_impossible_codes_are_refused(precision: Precision) -> None:
    data, _ = sample(5, 8, 0.999, 1)
    arrays = stored(data, precision)
    with pytest.raises(ValueError, match="codes"):
        decode_topk(
            data.counts,
            {**arrays, "codes": np.full_like(arrays["codes"], FILL["codes"][precision])},
            precision,
        )
    with pytest.raises(ValueError, match="32 bits"):
        decode_topk(
            data.counts, {**arrays, "id_gaps": np.full_like(arrays["id_gaps"], FILL["id_gaps"])}, precision
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_tokens_than_one_sort_takes(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = sample(50, 8, 0.999, 2)
    whole = decode_topk(data.counts, stored(data, precision), precision)
    monkeypatch.setattr(topk_encoding, "BLOCK_TOKENS", 7)
    parts = decode_topk(data.counts, stored(data, precision), precision)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_large_ids_survive() -> None:
    counts = np.array([2, 0, 3], np.uint16)
    ids = np.array([2**31 - 1, 0, 2**31 - 2, 5, 2**31 - 1], np.int32)
    logprobs = np.array([-0.5, -1, -0.25, -2, -3], np.float16)
    tail = np.array([-3, 0, -4], np.float32)
    for precision in PRECISIONS:
        decoded = decode_topk(counts, encode_topk(counts, ids, logprobs, tail, tail, precision), precision)
        assert decoded["ids"].tolist() == ids.tolist()
