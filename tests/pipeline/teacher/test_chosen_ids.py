"""Ids that the student chose, through client and service; beside requests of the first version, and old services."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch
from running import running, service_info

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.sections.model_settings import ServiceConfig
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.wire.messages import CONTENT_TYPE, ScoreItem, ScoreRequest, encode_request
from tropd.storage.errors import ConfigError

V, C = 24, 4


def serving(model: Any, max_chosen: int) -> Any:
    settings = ServiceConfig(max_request_tokens=100)
    info = service_info(settings).model_copy(
        update={"max_chosen": max_chosen, "entropy": True, "max_topk": V}
    )
    return running(create_app(TransformersEngine(model, [1]), info, settings, None))


def items(chosen: bool) -> list[ScoreItem]:
    random = np.random.default_rng(0)
    found = []
    for n in (5, 9, 30, 30, 30):  # more than one request takes
        ids = np.array([random.permutation(V)[:C] for _ in range(n - 2)], dtype=np.int32)
        found.append(
            ScoreItem(
                random.integers(2, V, size=n).astype(np.int32),
                2,
                np.full(n - 2, -1.0, dtype=np.float32),
                0,
                ids if chosen else None,
            )
        )
    return found


def test_every_id_gets_its_log_prob_however_the_step_is_cut(tiny_model: Any) -> None:
    asked = items(chosen=True)
    with serving(tiny_model, C) as url, TeacherClient(url) as client:
        answer = client.score(ScoreRequest(asked, AllTrusted(), "none", 0, False, V, C, True))
        assert client.requests > 1
        plain = client.score(ScoreRequest(items(chosen=False), AllTrusted(), "none", 0, False, V))
    for item, found, without in zip(asked, answer.items, plain.items, strict=True):
        with torch.no_grad():
            exact = torch.log_softmax(tiny_model(torch.tensor(item.tokens[None]).long()).logits[0, 1:-1], -1)
        ids = torch.tensor(item.chosen).long()
        assert np.allclose(found.chosen_logprobs, exact.gather(-1, ids).numpy(), atol=1e-5)
        outside = exact.scatter(-1, ids, -torch.inf).logsumexp(-1)
        assert np.allclose(found.chosen_tail, outside.numpy(), atol=1e-5)
        assert found.chosen_overlap is not None
        assert len(found.topk_positions) == 0
        assert np.allclose(found.teacher_logprobs, without.teacher_logprobs, atol=1e-5)
        assert without.chosen_logprobs is None


def test_a_request_is_refused_with_row_and_field_before_the_model_runs(tiny_model: Any) -> None:
    (broken,) = items(chosen=True)[:1]
    assert broken.chosen is not None
    broken.chosen[1, 2] = V
    request = ScoreRequest([broken], AllTrusted(), "none", 0, False, V, C, False)
    for limit, words in (
        (C, "sequence 0: column 'chosen': id 24 at scored token 1"),
        (C - 1, "option chosen"),
    ):
        with serving(tiny_model, limit) as url:
            headers = {"content-type": CONTENT_TYPE}
            answer = httpx.post(f"{url}/v1/score", content=encode_request(request), headers=headers)
        assert answer.status_code == 422
        assert words in answer.json()["error"]


def test_a_teacher_that_gives_none_is_refused_before_the_first_step(tiny_model: Any) -> None:
    """As a service of an earlier version, whose description does not know the limit."""
    objective = load_objective("rkl-topk", {"k": C})
    with serving(tiny_model, 0) as url, TeacherClient(url) as client:
        with pytest.raises(
            ConfigError, match=r"the student's top 4 .*alternatives = 'student'.* no log-probs of chosen"
        ):
            client.check_gives(teacher_needs(objective), objective)
        for name in ("opd", "tropd", "prune-opd-teacher"):
            other = load_objective(name, {"k": C})
            client.check_gives(teacher_needs(other), other)
    with serving(tiny_model, C) as url, TeacherClient(url) as client:
        client.check_gives(teacher_needs(objective), objective)
        larger = load_objective("rkl-topk", {"k": C + 1})
        with pytest.raises(ConfigError, match="those of 4 chosen ids"):
            client.check_gives(teacher_needs(larger), larger)
