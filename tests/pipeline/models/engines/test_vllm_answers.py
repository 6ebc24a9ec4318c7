"""What vLLM answers, taken apart without vLLM; and what is said where it cannot be used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tropd.pipeline.config.sections.model_settings import VllmConfig
from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.models.engines.child import vllm_transfer
from tropd.pipeline.models.engines.vllm import VllmEngine
from tropd.pipeline.models.engines.vllm_answers import (
    PromptLogprobs,
    answer_scores,
    checked_logprobs,
    outputs_of,
)
from tropd.storage.errors import ConfigError, TropdError


def flat(*positions: list[tuple[int, float]]) -> Any:
    """Flat log-probs as vLLM gives them: nothing for the first token, then (id, log-prob) pairs."""
    starts, ids, logprobs = [0], [], []
    for pairs in positions:
        starts.append(len(ids))
        ids += [i for i, _ in pairs]
        logprobs += [p for _, p in pairs]
    return SimpleNamespace(start_indices=starts, token_ids=ids, logprobs=logprobs)


def test_own_logprob_first_then_the_alternatives() -> None:
    answer = PromptLogprobs(flat([(7, -2.0), (3, -0.5), (7, -2.0)], [(5, -0.1), (5, -0.1), (4, -3.0)]), 2)
    scores = answer_scores(answer, 1, np.arange(2), 2, 24)
    np.testing.assert_allclose(scores.token_logprobs, [-2.0, -0.1])
    assert scores.topk_ids.tolist() == [[3, 7], [5, 4]]
    np.testing.assert_allclose(scores.topk_logprobs, [[-0.5, -2.0], [-0.1, -3.0]])
    later = answer_scores(answer, 2, np.array([0]), 1, 24)
    assert (later.token_logprobs.tolist(), later.topk_ids.tolist()) == ([pytest.approx(-0.1)], [[5]])


def test_ids_that_are_no_tokens_give_way_to_the_next() -> None:
    answer = PromptLogprobs(flat([(7, -2.0), (30, -0.2), (3, -1.7), (7, -2.0)]), 3)
    assert answer_scores(answer, 1, np.arange(1), 2, 24).topk_ids.tolist() == [[3, 7]]
    with pytest.raises(TropdError, match="fewer than 3"):
        answer_scores(answer, 1, np.arange(1), 3, 24)


def test_what_is_no_logprob_does_not_go_on() -> None:
    np.testing.assert_array_equal(
        checked_logprobs(np.array([5e-4, -1.0], np.float32)), np.float32([0.0, -1.0])
    )
    for value in (0.146, np.nan):
        with pytest.raises(TropdError, match="as a log-prob"):
            checked_logprobs(np.array([-1.0, value], dtype=np.float32))


def make(folder: Path) -> VllmEngine:
    return VllmEngine(folder, [1], VllmConfig(), dtype="float32", num_tokens=24, max_length=64, most_topk=8)


def test_a_missing_vllm_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"tropd\[vllm\]"):
        make(tmp_path)


def test_a_build_for_gpus_without_one_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="built for GPUs, and PyTorch sees none"):
        make(tmp_path)


def scripted(folder: Path, decoded: float, scored: float) -> VllmEngine:
    """An engine around an LLM that always writes token 5, and gives it these log-probs.

    ``vllm`` has to be in ``sys.modules``.
    """

    def generate(inputs: list[Any], parameters: list[Any], **_: Any) -> list[Any]:
        outputs = []
        for given, asked in zip(inputs, parameters, strict=True):
            new = [5] * asked.max_tokens
            prompt = flat(*[[(t, scored)] for t in given["prompt_token_ids"][1:]])
            logprobs = SimpleNamespace(logprobs=[decoded] * len(new), start_indices=list(range(len(new))))
            answer = SimpleNamespace(token_ids=new, logprobs=logprobs, finish_reason="length")
            outputs.append(SimpleNamespace(outputs=[answer], prompt_logprobs=prompt))
        return outputs

    vllm: Any = sys.modules["vllm"]
    vllm.LLM = lambda **_: SimpleNamespace(
        generate=generate, apply_model=lambda change: [True], reset_prefix_cache=lambda: True
    )
    return make(folder)


@pytest.fixture
def pretended_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``vllm`` that can be imported, and environment variables that are as before afterwards."""
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_model_in_bfloat16_is_opened_with_logits_in_float32(
    on_gpu: bool, tmp_path: Path, pretended_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def llm(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(apply_model=lambda change: [True])

    cast(Any, sys.modules["vllm"]).LLM = llm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    (tmp_path / "config.json").write_text("{}")
    VllmEngine(tmp_path, [1], VllmConfig(), dtype="bfloat16", num_tokens=24, max_length=64, most_topk=8)
    assert asked.get("hf_overrides") == ({"head_dtype": "float32"} if on_gpu else None)


@pytest.mark.parametrize("version", ["no weight transfer", "the worker's affair"])
def test_a_vllm_that_cannot_take_weights_so_is_refused_by_its_version(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "vllm.distributed.weight_transfer"
    for name in ("vllm", "vllm.config", "vllm.distributed", base, f"{base}.factory", f"{base}.ipc_engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    if version == "the worker's affair":
        for name, attribute in (
            ("vllm.config", "WeightTransferConfig"),
            (f"{base}.factory", "WeightTransferEngineFactory"),
            (f"{base}.ipc_engine", "IPCWeightTransferEngine"),
        ):
            setattr(sys.modules[name], attribute, type(attribute, (), {}))
    with pytest.raises(ConfigError, match="cannot take the weights of a student in training") as refused:
        vllm_transfer.config()
    assert "vLLM 0.27" in str(refused.value.hint)


def test_outputs_are_told_of_as_they_finish_and_come_back_in_order() -> None:
    def output(number: int, finished: bool) -> Any:
        logprobs = SimpleNamespace(logprobs=[-float(number)], start_indices=[0])
        answer = SimpleNamespace(token_ids=[number], logprobs=logprobs, finish_reason="stop")
        return SimpleNamespace(request_id=str(number), finished=finished, outputs=[answer])

    # Numbers go on from earlier requests; names may have more characters than outputs.
    steps = [[output(8, False)], [output(9, True)], [output(10, True), output(8, True)]]
    llm = SimpleNamespace(
        enqueue=lambda inputs, parameters, use_tqdm: ["8-6f1c", "9", "10-0a"],
        llm_engine=SimpleNamespace(has_unfinished_requests=lambda: bool(steps), step=lambda: steps.pop(0)),
    )
    told: list[Any] = []
    outputs = outputs_of(llm, [1, 2, 3], [None] * 3, lambda place, one: told.append((place, len(steps), one)))
    assert [one.request_id for one in outputs] == ["8", "9", "10"]
    assert told == [
        (1, 1, Generation([9], [-9.0], "stop")),
        (2, 0, Generation([10], [-10.0], "stop")),
        (0, 0, Generation([8], [-8.0], "stop")),
    ]


def test_a_vllm_without_the_two_parts_tells_nothing() -> None:
    llm = SimpleNamespace(generate=lambda inputs, parameters, use_tqdm: [*inputs])
    assert outputs_of(llm, [1, 2], [None] * 2, lambda place, one: pytest.fail("told")) == [1, 2]


def test_vllm_refuses_a_model_whose_decoding_and_scoring_differ(tmp_path: Path, pretended_vllm: None) -> None:
    folder = tmp_path / "Tiny"
    sound, broken = scripted(folder, -1.0, -1.0), scripted(folder, -1.0, -3.5)
    (answer,) = sound.generate([[3, 4]], Sampling(), seeds=[0], max_tokens=[4])
    assert answer.tokens == [5] * 4
    for _ in range(2):  # and again, should anyone go on
        with pytest.raises(
            ConfigError, match=r"Tiny in vLLM: log-probs of sampled tokens differ .* 2.5 nats"
        ):
            broken.generate([[3, 4]], Sampling(), seeds=[0], max_tokens=[4])
        with pytest.raises(ConfigError, match="Tiny in vLLM"):
            broken.score([[3, 4, 5]], [1])
