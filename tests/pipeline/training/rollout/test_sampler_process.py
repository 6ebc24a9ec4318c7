"""The sampler in a process of its own samples as the engine in this one, with the weights it was given last."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.models.engines.base import Sampling, choose_with
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model
from tropd.pipeline.training.rollout.sampler_process import SamplingProcess
from tropd.storage.errors import TropdError

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_runs import make_models

RANK = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "5,7"}
PROMPTS = [[3, 4, 5], [6, 7], [8]]
ASKED: dict[str, Any] = {"seeds": [0, 1, 2], "max_tokens": [12, 9, 5]}


def build(folder: Path) -> TransformersEngine:
    torch.set_num_threads(1)
    if multiprocessing.parent_process() is not None:
        (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    model = load_model(folder, dtype="float32", device=torch.device("cpu"), trust_remote_code=False)
    return TransformersEngine(model, [1], batch_size=2)


def fail() -> TransformersEngine:
    raise MemoryError("no room for the model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def others() -> set[Any]:
    """Processes of pools that other tests have left."""
    return set(multiprocessing.active_children())


@pytest.fixture
def sampler(folder: Path, others: set[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[SamplingProcess]:
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    process = SamplingProcess(partial(build, folder), build(folder).model.state_dict(), 40)
    yield process
    process.close()


def test_it_samples_as_this_process_would_and_sees_new_weights(
    folder: Path, sampler: SamplingProcess
) -> None:
    here = build(folder)
    sampler.set_weights(here.model.state_dict().items())
    first = sampler.generate(PROMPTS, Sampling(), **ASKED)
    assert first == here.generate(PROMPTS, Sampling(), **ASKED)
    with torch.no_grad():
        for parameter in here.model.parameters():
            parameter.mul_(1.3)
    assert sampler.generate(PROMPTS, Sampling(), **ASKED) == first  # until it is given them
    sampler.set_weights(here.model.state_dict().items())
    second = sampler.generate(PROMPTS, Sampling(), **ASKED)
    assert second == here.generate(PROMPTS, Sampling(), **ASKED) != first
    assert sampler.max_length == 40
    there = json.loads(
        (folder / "environment.json").read_text()
    )  # of a process that is no rank, and has its GPU
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT"} & there.keys()
    assert there["CUDA_VISIBLE_DEVICES"] == "7"
    ids = sampler.choose(PROMPTS, [1, 1, 1], 3, 20)
    for found, expected in zip(ids, choose_with(here)(PROMPTS, [1, 1, 1], 3, 20), strict=True):
        assert np.array_equal(found, expected)


def test_a_process_that_is_killed_at_work_is_an_error_that_says_so(
    folder: Path, others: set[Any], sampler: SamplingProcess
) -> None:
    sampler.set_weights(build(folder).model.state_dict().items())
    sampler.generate(PROMPTS, Sampling(), **ASKED)
    (process,) = set(multiprocessing.active_children()) - others
    timer = threading.Timer(0.1, process.kill)
    timer.start()
    many: dict[str, Any] = {"seeds": list(range(4000)), "max_tokens": [30] * 4000}
    with pytest.raises(TropdError, match="process that samples for the student has ended"):
        sampler.generate([[3, 4]] * 4000, Sampling(), **many)


def test_a_model_that_cannot_be_loaded_is_an_error(folder: Path) -> None:
    process = SamplingProcess(fail, build(folder).model.state_dict(), 40)
    try:
        with pytest.raises(TropdError, match="process that samples for the student has ended"):
            process.generate(PROMPTS, Sampling(), **ASKED)
    finally:
        process.close()
