"""A real ``vllm serve`` as teacher, as an ordinary user would start it. Needs a Python with vLLM in .venv-vllm."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from waiting import eventually

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.experiments.demo.tiny_models import TEACHER, make_model
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.partition_specs import NoneTrusted, RatioPartition, SampledPartition
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest
from tropd.storage.errors import ConfigError

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
V, MAX_LOGPROBS = 24, 13
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: make test-vllm makes it"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32: vLLM's attention on a CPU takes no smaller ones."""
    made = make_model(TEACHER, seed=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # so that the log-probs differ from token to token
    return made


@pytest.fixture(scope="module")
def url(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "teacher"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--model",
        folder,
        "--port",
        port,
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    options += ["--max-logprobs", MAX_LOGPROBS, "--distributed-executor-backend", "uni"]
    log = folder.with_name("vllm.log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *map(str, options)],
            env=os.environ | ENVIRONMENT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: _healthy(url) or process.poll() is not None, 240, f"vLLM answers; see {log}")
        assert process.poll() is None, f"vLLM did not start: {log.read_text()[-3000:]}"
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def rows() -> list[ScoreItem]:
    generator = np.random.default_rng(0)
    made = []
    for seed in range(20):
        tokens = generator.integers(2, V, size=int(generator.integers(3, 120))).astype(np.int32)
        start = int(generator.integers(1, len(tokens)))
        made.append(
            ScoreItem(tokens, start, -generator.random(len(tokens) - start, dtype=np.float32) * 3, seed)
        )
    return made


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "partition",
    [SampledPartition(), RatioPartition(threshold=0.05), NoneTrusted()],
    ids=["sampled", "few", "none trusted"],
)
def test_scores_are_those_of_a_local_forward_also_the_second_time(
    url: str, model: Any, partition: Any
) -> None:
    items = rows()
    exact = TransformersEngine(model, [1]).score(
        [item.tokens.tolist() for item in items], [item.start for item in items], k=5
    )
    with TeacherClient(url, timeout_seconds=60) as client:
        for _ in range(2):  # the second time finds a prefix cache
            answer = client.score(ScoreRequest(items, partition, "outliers", 5, False, V))
            for got, expected in zip(answer.items, exact, strict=True):
                assert np.allclose(got.teacher_logprobs, expected.token_logprobs, atol=1e-4)
                places = got.topk_positions
                assert np.array_equal(places, np.flatnonzero(~got.trusted))
                assert np.allclose(got.topk_logprobs, expected.topk_logprobs[places], atol=1e-4)
                apart = np.abs(np.diff(expected.topk_logprobs[places], axis=1, append=-np.inf)) > 1e-4
                apart[:, 1:] &= apart[:, :-1]
                assert np.array_equal(got.topk_ids[apart], expected.topk_ids[places][apart])
        assert client.topk_tokens > 0


@pytest.mark.timeout(400)
def test_its_limits_and_its_tokenizer_are_found(url: str) -> None:
    tokenizer = make_tokenizer()
    with TeacherClient(url, timeout_seconds=60) as client:
        info = client.info()
        assert (info.kind, info.max_topk, info.max_length) == ("vllm", MAX_LOGPROBS - 8, 127)
        assert client.check_token_texts(tokenizer.decode, len(tokenizer))
        objective = load_objective("tropd", {"k": 6})
        with pytest.raises(ConfigError, match="gives 5 alternatives"):
            client.check_gives(teacher_needs(objective), objective)
        with pytest.raises(ConfigError, match=r"token \d+ is '.*' there"):
            client.check_token_texts(lambda ids: tokenizer.decode([{5: 6, 6: 5}.get(i, i) for i in ids]), V)
        longest = ScoreItem(np.full(127, 3, np.int32), 1, np.full(126, -1, np.float32), 0)
        assert len(client.score(ScoreRequest([longest], SampledPartition(), "none", 0, False, V)).items) == 1
