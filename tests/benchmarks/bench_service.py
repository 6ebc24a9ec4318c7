"""The teacher service under load, under fire, and beside vLLM's JSON.

    python tests/benchmarks/bench_service.py [load|fuzz|wire ...] [--seconds 120] [--no-kills] [--vllm PATH/TO/python]

load  64 clients on two replicas, one of which is killed and started again all the while; every answer is compared
      with a local forward. Prints latencies, losses (there must be none) and memory.
fuzz  ten thousand malformed requests; each must be refused with a reason, and good ones answered in between.
wire  scored tokens per second and bytes on the wire: our requests, which get alternatives for outliers only, against
      the top 64 of every token as JSON, from a server that answers as vLLM's does, and from a real one if there is a
      Python with vLLM (default: .venv-vllm in the working directory).
"""

from __future__ import annotations

import os

# Waiting threads must not spin: there are more of them than cores. Before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import uvicorn
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tropd.pipeline.config.sections.model_settings import ServiceConfig, VllmConfig
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model
from tropd.pipeline.objectives.partition_specs import AllTrusted, SampledPartition
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.client.vllm_dialect import SPARE
from tropd.pipeline.teacher.service.listen import listen
from tropd.pipeline.teacher.service.running import run_service
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest, ScoreResponse
from tropd.storage.errors import TropdError

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "teacher"))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from fuzz import fuzz
from running import fake_vllm

CLIENTS, K = 64, 64
VOCABULARY, LONGEST = 4096, 512
PROMPT, RESPONSE, ROWS, ROUNDS = 64, 192, 16, 5
TRUSTED = 0.9
"""Chance that a token is accepted, in the requests of ``wire``."""
# vLLM on a CPU, in a process beside others.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
VLLM_START_SECONDS = 300.0


def save_model(folder: Path) -> None:
    """A random model of 2 M parameters over a vocabulary of words, for whoever reads Hugging Face directories."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        max_position_embeddings=LONGEST,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)


def load_engine(folder: Path) -> TransformersEngine:
    torch.set_num_threads(1)
    return TransformersEngine(load_model(folder, dtype="float32", device=torch.device("cpu")), [0])


def load_vllm_engine(folder: Path) -> Engine:
    from tropd.pipeline.models.engines.vllm import VllmEngine  # only where there is a vLLM

    return VllmEngine(
        folder,
        [0],
        VllmConfig(),
        dtype="float32",
        vocab_size=VOCABULARY,
        max_length=LONGEST,
        most_topk=K,
    )


# --------------------------------------------------------------------------------------- servers


def serve(kind: str, folder: Path, port: int) -> None:
    """Be a server until killed."""
    engine: Engine = load_vllm_engine(folder) if kind == "tropd on vLLM" else load_engine(folder)
    if kind == "json":
        app = fake_vllm(engine, name=str(folder), max_logprobs=K + SPARE)
        with listen("127.0.0.1", port) as listener:
            uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
        return
    settings = ServiceConfig(port=port)
    info = ServiceInfo(
        model=folder.name,
        weights="bench",
        tokenizer="bench",
        tokenizer_size=VOCABULARY,
        vocab_size=VOCABULARY,
        max_length=LONGEST,
        max_request_tokens=settings.max_request_tokens,
        max_request_bytes=settings.max_request_bytes,
        queue_tokens=settings.queue_tokens,
        max_topk=K,
    )
    run_service(engine, info, settings, token=None, on_ready=lambda url: None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server in a process of its own, at an address that it keeps when it is started again."""

    command: list[str]
    port: int
    ready_path: str = "/readyz"
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    log: Any = field(default_factory=tempfile.TemporaryFile)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | self.environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def ready(self) -> bool:
        try:
            return httpx.get(self.url + self.ready_path, timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > deadline or (self.process is not None and self.process.poll() is not None):
                self.log.seek(0)
                said = self.log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(self.command)} did not start: {said}")
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def memory(self) -> float:
        """Resident MiB; NaN while it is dead."""
        try:
            return float(psutil.Process(self.process.pid if self.process else -1).memory_info().rss / 2**20)
        except (psutil.Error, ValueError):
            return float("nan")


def own_server(kind: str, folder: Path, python: Path | str = sys.executable) -> Server:
    port = free_port()
    command = [
        str(python),
        __file__,
        "serve",
        "--kind",
        kind,
        "--folder",
        str(folder),
        "--port",
        str(port),
    ]
    return Server(command, port, "/v1/models" if kind == "json" else "/readyz")


def vllm_server(python: Path, folder: Path) -> Server:
    port = free_port()
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
    options += [
        "--max-logprobs",
        K + SPARE,
        "--max-model-len",
        LONGEST,
        "--distributed-executor-backend",
        "uni",
    ]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *map(str, options)]
    return Server(command, port, "/health", VLLM_ENVIRONMENT)


@contextmanager
def started(*servers: Server, seconds: float = 120.0) -> Iterator[None]:
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.kill)
        for server in servers:
            server.wait(seconds)
        yield


# ------------------------------------------------------------------------------------------ load


@dataclass(frozen=True)
class Known:
    """A request and what the model says to it here."""

    request: ScoreRequest
    expected: list[np.ndarray[Any, np.dtype[np.float32]]]


def known_requests(engine: TransformersEngine, count: int) -> list[Known]:
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        items = []
        for _ in range(int(generator.integers(1, 5))):
            n = int(generator.integers(4, 60))
            start = int(generator.integers(1, n))
            tokens = generator.integers(0, VOCABULARY, n).astype(np.int32)
            student = -generator.random(n - start, dtype=np.float32) * 12
            items.append(ScoreItem(tokens, start, student, int(generator.integers(2**62))))
        scores = engine.score([i.tokens.tolist() for i in items], [i.start for i in items])
        request = ScoreRequest(items, SampledPartition(), "outliers", 4, False, VOCABULARY)
        made.append(Known(request, [s.token_logprobs for s in scores]))
    return made


def is_right(known: Known, answer: ScoreResponse) -> bool:
    """The client has compared masks and alternatives with the log-probs; these are compared with the model's here."""
    return len(answer.items) == len(known.expected) and all(
        got.teacher_logprobs.shape == expected.shape
        and np.allclose(got.teacher_logprobs, expected, rtol=0, atol=1e-4)
        for got, expected in zip(answer.items, known.expected, strict=True)
    )


@dataclass
class Tally:
    """What the clients of a load test have seen."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    retries: int = 0
    tokens: int = 0
    kills: int = 0
    memory: dict[str, list[float]] = field(default_factory=dict)


async def load(folder: Path, seconds: float, kills: bool) -> Tally:
    """Clients that never rest, and somebody who kills servers."""
    known = known_requests(load_engine(folder), 400)
    servers = [own_server("tropd", folder) for _ in range(2)]
    tally, dice = Tally(), random.Random(0)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(CLIENTS + 8))
    with started(*servers):
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            own = random.Random(number)
            with TeacherClient([server.url for server in servers], timeout_seconds=120) as teacher:
                while time.monotonic() < end:
                    chosen = own.choice(known)
                    began = time.monotonic()
                    try:
                        answer = await asyncio.to_thread(teacher.score, chosen.request)
                    except TropdError as error:
                        tally.lost.append(str(error))
                        return
                    tally.seconds.append(time.monotonic() - began)
                    tally.wrong += not is_right(chosen, answer)
                tally.retries += teacher.retries
                tally.tokens += teacher.tokens_scored

        async def killer() -> None:
            while kills and time.monotonic() < end:
                await asyncio.sleep(dice.uniform(1.0, 4.0))
                victim = dice.choice(servers)
                victim.kill()
                tally.kills += 1
                await asyncio.sleep(dice.uniform(0.0, 1.0))
                victim.start()
                await asyncio.to_thread(victim.wait)

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(seconds / 40)
                for name, value in (
                    ("clients", psutil.Process().memory_info().rss / 2**20),
                    *(
                        (f"server {n}.{s.process.pid if s.process else 0}", s.memory())
                        for n, s in enumerate(servers)
                    ),
                ):
                    tally.memory.setdefault(name, []).append(value)

        await asyncio.gather(killer(), watch(), *(client(n) for n in range(CLIENTS)))
    return tally


def report_load(tally: Tally, seconds: float) -> bool:
    times = sorted(tally.seconds)
    p50, p99 = (times[int(len(times) * q)] * 1000 for q in (0.5, 0.99))
    print(f"load: {CLIENTS} clients, 2 replicas, {seconds:.0f} s, {tally.kills} kills")
    print(
        f"  {len(times):,} requests answered ({len(times) / seconds:,.0f}/s, {tally.tokens / seconds:,.0f} tokens/s), "
        f"{tally.retries:,} retries, {tally.wrong} wrong, {len(tally.lost)} lost"
    )
    print(f"  latency p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {times[-1] * 1000:.0f} ms")
    for name, values in tally.memory.items():
        alive = [v for v in values if not np.isnan(v)]
        if len(alive) >= 8:  # the first quarter warms up
            print(
                f"  memory of {name}: {alive[len(alive) // 4]:.0f} → {alive[-1]:.0f} MiB, at most {max(alive):.0f}"
            )
    for text in tally.lost[:3]:
        print(f"  lost: {text}")
    return not tally.wrong and not tally.lost


# ------------------------------------------------------------------------------------------ wire


def paper_like(engine: TransformersEngine) -> ScoreRequest:
    """Responses of which the teacher accepts each token with probability ``TRUSTED``."""
    generator = np.random.default_rng(1)
    rows = generator.integers(0, VOCABULARY, size=(ROWS, PROMPT + RESPONSE)).astype(np.int32)
    scores = engine.score(rows.tolist(), [PROMPT] * ROWS)
    items = [
        ScoreItem(tokens, PROMPT, np.minimum(s.token_logprobs - np.float32(np.log(TRUSTED)), 0.0), n)
        for n, (tokens, s) in enumerate(zip(rows, scores, strict=True))
    ]
    return ScoreRequest(items, SampledPartition(), "outliers", K, False, VOCABULARY)


def top_of_everything(url: str, model: str, request: ScoreRequest) -> tuple[int, int]:
    """Ask for the top ``K`` of every token as JSON, and read it. Returns bytes sent and received."""
    body = json.dumps(
        {
            "model": model,
            "prompt": [item.tokens.tolist() for item in request.sequences],
            "prompt_logprobs": K,
            "max_tokens": 1,
            "temperature": 0.0,
        }
    ).encode()
    response = httpx.post(
        f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=600
    )
    assert response.status_code == 200, response.text[:300]
    choices = response.json()["choices"]
    assert len(choices) == ROWS
    assert len(choices[0]["prompt_logprobs"][-1]) >= K
    return len(body), len(response.content)


def through_client(client: TeacherClient, request: ScoreRequest) -> tuple[int, int]:
    sent, received = client.bytes_sent, client.bytes_received
    client.score(request)
    return client.bytes_sent - sent, client.bytes_received - received


def wire(folder: Path, python: Path | None) -> None:
    engine = load_engine(folder)
    request = paper_like(engine)
    k1 = ScoreRequest(request.sequences, AllTrusted(), "none", 0, False, VOCABULARY)
    servers = {"tropd": own_server("tropd", folder), "fake vLLM": own_server("json", folder)}
    if python is not None:
        servers["tropd on vLLM"] = own_server("tropd on vLLM", folder, python)
        servers["vLLM"] = vllm_server(python, folder)
    ways: dict[str, Callable[[], tuple[int, int]]] = {}
    times: dict[str, list[float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with started(*servers.values(), seconds=VLLM_START_SECONDS), ExitStack() as stack:
        for name, server in servers.items():
            client = stack.enter_context(TeacherClient(server.url, timeout_seconds=600))
            ways[f"{name}, partition-aware"] = partial(through_client, client, request)
            ways[f"{name}, K1 only"] = partial(through_client, client, k1)
            if not name.startswith("tropd"):
                everything = partial(top_of_everything, server.url, str(folder), request)
                ways[f"{name}, top {K} of every token"] = everything
        for _ in range(ROUNDS + 1):  # the first round warms up
            for name, way in ways.items():
                began = time.perf_counter()
                sizes[name] = way()
                times.setdefault(name, []).append(time.perf_counter() - began)
    tokens = ROWS * RESPONSE
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    first = next(iter(ways))
    print(
        f"wire: {ROWS} sequences of {PROMPT} + {RESPONSE} tokens, {VOCABULARY:,} ids, top {K}, "
        f"{1 - TRUSTED:.0%} outliers, median of {ROUNDS} rounds in turns"
    )
    for name in ways:
        sent, received = sizes[name]
        print(
            f"  {name:34}{tokens / seconds[name]:>9,.0f} tokens/s{(sent + received) / tokens:>10,.1f} bytes/token"
            f"   speed 1/{seconds[name] / seconds[first]:.1f}   bytes x{(sent + received) / sum(sizes[first]):.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["load", "fuzz", "wire"], help="load, fuzz, wire")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the load test")
    parser.add_argument("--kills", action=argparse.BooleanOptionalAction, default=True, help="kill replicas")
    parser.add_argument("--shots", type=int, default=10_000, help="malformed requests")
    parser.add_argument(
        "--vllm", type=Path, default=Path(".venv-vllm/bin/python"), help="a Python that has vLLM"
    )
    parser.add_argument("--kind", default="tropd", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.parts == ["serve"]:
        serve(given.kind, given.folder, given.port)
        return 0
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(folder)
        if "load" in given.parts:
            good &= report_load(asyncio.run(load(folder, given.seconds, given.kills)), given.seconds)
        if "fuzz" in given.parts:
            good &= report_fuzz(given.shots)
        if "wire" in given.parts:
            python = given.vllm.absolute() if given.vllm.exists() else None
            if python is None:
                print(
                    f"wire: no {given.vllm}, so only the server that answers as vLLM's does (make test-vllm makes one)"
                )
            wire(folder, python)
    return 0 if good else 1


def report_fuzz(shots: int) -> bool:
    from conftest import TableEngine  # of the teacher's tests: its log-probs are known without a model

    engine = TableEngine()
    began = time.monotonic()
    refused = fuzz(engine, shots, seed=1, expected=engine.expected)
    print(
        f"fuzz: {refused.total():,} malformed requests refused in {time.monotonic() - began:.0f} s, "
        f"{shots // 100:,} good ones in between answered rightly"
    )
    for kind, count in sorted(refused.items()):
        print(f"  {kind:42}{count:>7,}")
    return refused.total() == shots


if __name__ == "__main__":
    sys.exit(main())
