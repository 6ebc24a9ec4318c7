"""A plain vLLM server as teacher: the same answers as from our service, within its limits, and nothing made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from running import fake_vllm, running

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.partition_specs import (
    AllTrusted,
    NoneTrusted,
    RatioPartition,
    SampledPartition,
)
from tropd.pipeline.teacher.client import vllm_dialect, vllm_json
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest
from tropd.storage.errors import ConfigError, TropdError

V = 24


def items(count: int = 12, longest: int = 30) -> list[ScoreItem]:
    generator = np.random.default_rng(3)
    made = []
    for seed in range(count):
        tokens = generator.integers(0, 22, size=int(generator.integers(3, longest))).astype(np.int32)
        start = int(generator.integers(1, len(tokens)))
        student = -generator.random(len(tokens) - start, dtype=np.float32) * 3
        made.append(ScoreItem(tokens, start, student, seed))
    return made


def ask(rows: list[ScoreItem], partition: Any = None, topk: Any = "outliers", k: int = 5) -> ScoreRequest:
    return ScoreRequest(rows, partition or SampledPartition(), topk, k, False, V)


def ours(engine: Any) -> Any:
    settings = ServiceConfig()
    info = ServiceInfo(
        model="toy",
        weights="w",
        tokenizer="t",
        tokenizer_size=V,
        vocab_size=V,
        max_length=64,
        max_request_tokens=settings.max_request_tokens,
        max_request_bytes=settings.max_request_bytes,
        queue_tokens=settings.queue_tokens,
    )
    return create_app(engine, info, settings, None)


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize(
    ("partition", "topk"),
    [
        (SampledPartition(), "outliers"),
        (RatioPartition(threshold=0.02), "outliers"),
        (SampledPartition(), "all"),
        (NoneTrusted(), "outliers"),
        (AllTrusted(), "outliers"),
        (SampledPartition(), "none"),
    ],
    ids=["sampled", "few", "sampled, all", "none trusted", "all trusted", "no alternatives"],
)
def test_answers_are_those_of_our_own_service(
    tiny_model: Any, partition: Any, topk: Any, caches: bool
) -> None:
    request = ask(items(longest=60), partition, topk, k=0 if topk == "none" else 5)
    engine = TransformersEngine(tiny_model, [1])
    with running(ours(engine)) as mine, running(fake_vllm(engine, caches=caches)) as other:
        with TeacherClient(mine) as one, TeacherClient(other) as two:
            expected, found = one.score(request), two.score(request)
            assert two.info().kind == "vllm"
            assert (two.tokens_scored, two.topk_tokens) == (one.tokens_scored, one.topk_tokens)
            assert two.bytes_received > one.bytes_received
    for wanted, got in zip(expected.items, found.items, strict=True):
        assert np.allclose(got.teacher_logprobs, wanted.teacher_logprobs, atol=1e-5)
        assert np.array_equal(got.trusted, wanted.trusted)
        assert np.array_equal(got.topk_positions, wanted.topk_positions)
        if len(wanted.topk_positions):
            assert np.array_equal(got.topk_ids, wanted.topk_ids)
            assert np.allclose(got.topk_logprobs, wanted.topk_logprobs, atol=1e-5)
            assert np.allclose(np.exp(got.tail), np.exp(wanted.tail), atol=1e-5)


def test_alternatives_are_asked_for_sequences_with_outliers_up_to_the_last_one(table_engine: Any) -> None:
    rows = [
        replace(row, student_logprobs=row.student_logprobs - 30.0 * (n % 3 == 0))  # surely trusted
        for n, row in enumerate(items())
    ]
    app = fake_vllm(table_engine, caches=False)
    with running(app) as url, TeacherClient(url) as client:
        client.info()
        app.state.requests.clear()
        answer = client.score(ask(rows))
    first, second = app.state.requests
    assert first["prompt"] == [row.tokens.tolist() for row in rows]
    assert (first["prompt_logprobs"], second["prompt_logprobs"]) == (0, 5 + 8)
    expected = [
        row.tokens[: row.start + 1 + int(got.topk_positions[-1])].tolist()
        for row, got in zip(rows, answer.items, strict=True)
        if len(got.topk_positions)
    ]
    assert second["prompt"] == expected
    assert 0 < len(expected) < len(rows)
    assert {first["max_tokens"], second["max_tokens"]} == {1}
    assert first["add_special_tokens"] is False


def test_few_alternatives_are_asked_for_one_by_one_where_prefixes_are_cached(table_engine: Any) -> None:
    rows = items(longest=60)
    app = fake_vllm(table_engine)
    with running(app) as url, TeacherClient(url) as client:
        client.info()
        app.state.requests.clear()
        answer = client.score(ask(rows, RatioPartition(threshold=0.02)))
    places = [got.topk_positions for got in answer.items]
    few = [len(place) <= len(row.tokens) // 4 for row, place in zip(rows, places, strict=True)]
    following = [body["prompt"] for body in app.state.requests if "logprobs" in body]
    assert [prompt for body in following for prompt in body] == [
        row.tokens[: row.start + int(at)].tolist()
        for row, place, one in zip(rows, places, few, strict=True)
        if one
        for at in place
    ]
    assert following
    _, *whole = [body["prompt"] for body in app.state.requests if "prompt_logprobs" in body]
    assert sum(map(len, whole)) == len(few) - sum(few) > 0


def test_long_requests_are_cut_and_put_together_again(
    table_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = items(20)
    app = fake_vllm(table_engine)
    with running(app) as url, TeacherClient(url) as client:
        whole = client.score(ask(rows))
        monkeypatch.setattr(vllm_json, "MAX_PROMPTS", 3)
        monkeypatch.setattr(vllm_json, "MAX_NUMBERS", 100)
        app.state.requests.clear()
        cut = client.score(ask(rows))
    assert len(app.state.requests) > 10
    assert max(len(body["prompt"]) for body in app.state.requests) <= 3
    for a, b in zip(whole.items, cut.items, strict=True):
        assert np.array_equal(a.teacher_logprobs, b.teacher_logprobs)
        assert np.array_equal(a.topk_ids, b.topk_ids)


def test_more_alternatives_than_the_vocabulary_are_never_asked_for(table_engine: Any) -> None:
    with running(fake_vllm(table_engine, max_logprobs=64)) as url, TeacherClient(url) as client:
        answer = client.score(ask(items(), NoneTrusted(), k=64))
        assert {item.topk_ids.shape[1] for item in answer.items} == {V}


def test_the_limits_are_known_and_refused_before_the_first_rollout(table_engine: Any) -> None:
    with running(fake_vllm(table_engine, max_logprobs=20)) as url, TeacherClient(url) as client:
        assert client.info().max_topk == 12  # 8 more are asked for than are wanted
        assert client.info().max_length == 63  # it always generates a token
        objective = load_objective("tropd", {"k": 13})
        with pytest.raises(
            ConfigError, match=r"needs the teacher's top 13 .*gives 12 alternatives"
        ) as caught:
            client.check_gives(teacher_needs(objective), objective)
        assert "--max-logprobs 21" in str(caught.value.hint)
        fitting = load_objective("tropd", {"k": 12})
        client.check_gives(teacher_needs(fitting), fitting)
        entropy = load_objective("eopd", {"k": 4})
        with pytest.raises(ConfigError, match=r"partition\.rule = 'teacher_entropy'"):
            client.check_gives(teacher_needs(entropy), entropy)
        chosen = load_objective("rkl-topk", {"k": 4})
        with pytest.raises(ConfigError, match=r"the student's top 4.* no log-probs of chosen ids") as beyond:
            client.check_gives(teacher_needs(chosen), chosen)
        assert "a vLLM server reports its own likeliest ids only" in str(beyond.value.hint)
        client.check_compatible("any", V, 63)
        with pytest.raises(ConfigError, match=r"takes 63 tokens.* need 64") as short:
            client.check_compatible("any", V, 64)
        assert "--max-model-len 65" in str(short.value.hint)


def first_entry(answer: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))
    return entry


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda a: first_entry(a).update(logprob=0.146), r"log-prob of \+0\.146.*--no-enable-prefix-caching"),
        (lambda a: first_entry(a).update(logprob="x"), "unusable answer: a log-prob is not a number"),
        (lambda a: first_entry(a).pop("logprob"), "unusable answer: no log-prob of token"),
        (lambda a: a["choices"][0]["prompt_logprobs"].__setitem__(-1, {}), "no log-prob of token"),
        (lambda a: a["choices"][0]["prompt_logprobs"].__setitem__(-1, None), "unusable answer"),
        (lambda a: a["choices"][0]["prompt_logprobs"].pop(), "not about these sequences"),
        (lambda a: a["choices"][0].update(prompt_logprobs=None), "unusable answer"),
        (lambda a: a["choices"].pop(), "not about these sequences"),
        (lambda a: a.update(model="another"), "not about these sequences"),
        (lambda a: a.pop("choices"), "unusable answer: 'choices'"),
    ],
    ids=range(10),
)
def test_answers_that_cannot_be_right_are_refused(
    table_engine: Any, alter: Callable[[dict[str, Any]], object], words: str
) -> None:
    with running(fake_vllm(table_engine, alter=alter)) as url, TeacherClient(url) as client:
        with pytest.raises(TropdError, match=f"(?s){words}"):
            client.score(ask(items(2)))
        assert client.tokens_scored == client.retries == 0


@pytest.mark.parametrize("caches", [True, False])
def test_rows_of_the_output_layer_that_are_no_tokens_are_left_out(tiny_model: Any, caches: bool) -> None:
    partition = RatioPartition(threshold=0.1)
    request = ScoreRequest(items(longest=60), partition, "outliers", 5, False, 17)
    engine = TransformersEngine(tiny_model, [1])
    with running(ours(engine)) as mine, running(fake_vllm(engine, caches=caches)) as other:
        with TeacherClient(mine) as one, TeacherClient(other) as two:
            expected, found = one.score(request), two.score(request)
    for wanted, got in zip(expected.items, found.items, strict=True):
        assert np.array_equal(got.topk_ids, wanted.topk_ids)
        assert np.allclose(got.topk_logprobs, wanted.topk_logprobs, atol=1e-5)
    assert any(len(item.topk_positions) for item in found.items)


def test_alternatives_that_the_student_does_not_know_are_never_replaced(table_engine: Any) -> None:
    request = ScoreRequest(items(), NoneTrusted(), "all", 5, False, 10)
    with running(fake_vllm(table_engine)) as url, TeacherClient(url) as client:
        with pytest.raises(
            TropdError, match=r"alternatives that the student knows, not 5.*ids of 10 and above"
        ):
            client.score(request)


def test_a_probability_of_zero_is_minus_infinity(table_engine: Any) -> None:
    table_engine.table[:, 3] = -np.inf
    row = ScoreItem(np.array([1, 3, 2], np.int32), 1, np.array([-1, -1], np.float32), 0)
    with running(fake_vllm(table_engine)) as url, TeacherClient(url) as client:
        (answer,) = client.score(ask([row], NoneTrusted())).items
    assert answer.teacher_logprobs[0] == -np.inf
    assert np.isfinite(answer.teacher_logprobs[1])


def test_token_texts_are_compared(table_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    monkeypatch.setattr(vllm_dialect, "IDS_PER_TEXT", 7)

    def swapped(ids: list[int]) -> str:
        return str(tokenizer.decode([{9: 10, 10: 9}.get(i, i) for i in ids]))

    with running(fake_vllm(table_engine, decode=tokenizer.decode)) as url, TeacherClient(url) as client:
        assert client.check_token_texts(tokenizer.decode, size)
    with running(fake_vllm(table_engine)) as url, TeacherClient(url) as client:
        assert not client.check_token_texts(tokenizer.decode, size)
    honest, other = fake_vllm(table_engine, decode=tokenizer.decode), fake_vllm(table_engine, decode=swapped)
    with running(honest) as one, running(other) as two, TeacherClient([one, two]) as client:
        with pytest.raises(ConfigError, match=f"vLLM server at {two} has another tokenizer"):
            client.check_token_texts(tokenizer.decode, size)
    with running(fake_vllm(table_engine, decode=swapped)) as url, TeacherClient(url) as client:
        with pytest.raises(ConfigError, match=r"token 9 is '.*' there and '.*' here"):
            client.check_token_texts(tokenizer.decode, size)


def test_a_server_that_only_lists_models_as_vllm_does_is_refused() -> None:
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "x", "max_model_len": 100}]}

    with running(app) as url, TeacherClient(url) as client:
        with pytest.raises(TropdError, match="does not take prompt_logprobs as vLLM does: 404"):
            client.info()
