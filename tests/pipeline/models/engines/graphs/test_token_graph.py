"""Steps that are graphs give what the model gives. Graphs are stand-ins on a CPU (``pretend_cuda.graphs``), which keep
what a real one keeps: operations and memory. ``tests/gpu_shapes`` has the same on the tensors of a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pretend_cuda.graphs import Capture, Graph
from tiny_runs import TINY

from tropd.pipeline.models.engines import decoding, decoding_any
from tropd.pipeline.models.engines import transformers as engine_module
from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.models.engines.graphs import token_graph
from tropd.pipeline.models.engines.graphs.allocated_cache import AllocatedLayer
from tropd.pipeline.models.engines.graphs.token_graph import GraphUse
from tropd.pipeline.models.engines.transformers import TransformersEngine

PLAIN = Sampling()
LIMITS = [7, 30, 60, 45, 50, 25, 60, 12]
PROMPTS = [np.random.default_rng(n).integers(4, 40, size=1 + 3 * n % 11).tolist() for n in range(8)]


class Stream:
    """A stream of a CPU: there is one only."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on the CPU, remade every few columns; caches that grow; rows that leave at once."""
    stand_ins = {
        "Stream": Stream,
        "stream": lambda *_: nullcontext(),
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "graph": Capture,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(engine_module, "graphs_for", lambda model: GraphUse("Tiny", model.device, columns=32))
    monkeypatch.setattr(decoding_any, "FIRST_STEPS", 20)
    monkeypatch.setattr(decoding, "DONE_SHARE", 0.0)


def make(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**(TINY | {"max_position_embeddings": 512} | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def engine_of(model: Any, *, graphs: bool, autocast: torch.dtype | None = None) -> TransformersEngine:
    return TransformersEngine(model, [3], lean=False, graphs=graphs, autocast=autocast)


def generate(
    engine: TransformersEngine, limits: list[int] = LIMITS, sampling: Sampling = PLAIN
) -> list[Generation]:
    return engine.generate(PROMPTS, sampling, seeds=range(8), max_tokens=limits)


def use_of(engine: TransformersEngine) -> GraphUse:
    assert engine.graphs is not None
    return engine.graphs


def assert_same(found: list[Generation], expected: list[Generation], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=tolerance)
        np.testing.assert_allclose(one.drawn_logprobs or [], other.drawn_logprobs or [], atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
    ],
)
def test_responses_are_those_of_the_model(kind: str, options: dict[str, Any]) -> None:
    """Padded rows that leave one after the other, graphs of several numbers of columns, and caches that double."""
    model = make(kind, **options)
    sampling = Sampling(0.7, 0.9) if kind == "Llama" else PLAIN
    graphed = engine_of(model, graphs=True)
    found = generate(graphed, sampling=sampling)
    assert_same(found, generate(engine_of(model, graphs=False), sampling=sampling))
    assert {one.finish_reason for one in found} == {"stop", "length"}
    assert use_of(graphed).works
    # After the proof's 2 · 23, of which each graph's first is none.
    longest = max(len(one.tokens) for one in found)
    assert use_of(graphed).replays > 24 + 0.7 * longest


def test_hundreds_of_tokens_of_rows_that_stay_together() -> None:
    model = make("Qwen3", head_dim=16)
    graphed = TransformersEngine(model, [], lean=False, graphs=True)
    plain = TransformersEngine(model, [], lean=False)
    limits = [256] * 8
    assert_same(generate(graphed, limits), generate(plain, limits))
    assert use_of(graphed).replays > 24 + 240


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"])
def test_in_bfloat16_too(kept_in: torch.dtype) -> None:
    model = make("Qwen2").to(kept_in)
    autocast = torch.bfloat16 if kept_in == torch.float32 else None
    graphed = engine_of(model, graphs=True, autocast=autocast)
    # Masked columns beyond the last are no others' sums: attention's kernels may add in another order.
    found, expected = generate(graphed), generate(engine_of(model, graphs=False, autocast=autocast))
    assert use_of(graphed).works
    firsts = [(one.tokens[:4], other.tokens[:4]) for one, other in zip(found, expected, strict=True)]
    assert sum(one == other for one, other in firsts) >= 6
    exact = TransformersEngine(copy.deepcopy(model).float(), [3], lean=False)
    rows = [[*prompt, *one.tokens] for prompt, one in zip(PROMPTS, found, strict=True)]
    scores = exact.score(rows, [len(prompt) for prompt in PROMPTS])
    for one, score in zip(found, scores, strict=True):
        np.testing.assert_allclose(one.logprobs, score.token_logprobs, atol=0.15)


def test_new_weights_are_seen_at_once() -> None:
    model = make("Qwen3")
    graphed = engine_of(model, graphs=True)
    before = generate(graphed)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        after = generate(graphed)
        assert [one.tokens for one in after] != [one.tokens for one in before]
        assert_same(after, generate(engine_of(model, graphs=False)))
        before = after


def _stale_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: self)


def _columns_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's length, which a graph would keep."""
    update = AllocatedLayer.update

    def wrong(self: AllocatedLayer, keys: Any, values: Any, *arguments: Any) -> Any:
        if self.place is not None:
            column, columns = self.place
            self.place = (torch.full_like(column, int(column.clone().numpy()[0])), columns)
        return update(self, keys, values, *arguments)

    monkeypatch.setattr(AllocatedLayer, "update", wrong)


def _no_mask_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_graph.StaticInputs, "allowed", lambda self: self.mask[:, None, None, :])


def _old_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave, and the graph stays."""
    monkeypatch.setattr(token_graph.TokenGraph, "forget", lambda self: None)


def _fails(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", failing)


def _waits(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = token_graph.StaticInputs.allowed

    def waiting(self: Any) -> torch.Tensor:
        found = allowed(self)
        assert found.any().item()
        return found

    monkeypatch.setattr(token_graph.StaticInputs, "allowed", waiting)


@pytest.mark.parametrize(
    "mistake", [_stale_column, _columns_of_the_capture, _no_mask_of_columns, _old_rows, _fails, _waits]
)
def test_graphs_that_are_wrong_are_given_up(
    mistake: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The proof finds them, and responses are the model's."""
    model = make("Qwen3")
    expected = generate(engine_of(model, graphs=False))
    graphed = engine_of(model, graphs=True)
    with caplog.at_level("INFO", logger="tropd"):
        mistake(monkeypatch)
        found = generate(graphed)
    assert not use_of(graphed).works
    assert "Tiny decodes without CUDA graphs: " in caplog.text
    assert_same(found, expected)


def test_a_graph_that_fails_between_two_tokens_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("Llama")
    expected = generate(engine_of(model, graphs=False))
    graphed = engine_of(model, graphs=True)
    assert_same(generate(graphed), expected)
    replay, left = Graph.replay, [40]

    def failing(self: Graph) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("CUDA error: unspecified launch failure")
        replay(self)

    monkeypatch.setattr(Graph, "replay", failing)
    with caplog.at_level("INFO", logger="tropd"):
        assert_same(generate(graphed), expected)
    assert left == [0]
    assert "without CUDA graphs: CUDA error: unspecified launch failure" in caplog.text
    assert_same(generate(graphed), expected)


def test_a_model_that_is_wrong_without_graphs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = decoding_any.ModelDecoder.start

    def mistaken(self: Any, *arguments: Any) -> Any:
        choice = start(self, *arguments)
        self._next = self._next + 1
        return choice

    monkeypatch.setattr(decoding_any.ModelDecoder, "start", mistaken)
    with pytest.raises(Exception, match="log-probs of sampled tokens differ"):
        generate(engine_of(make("Qwen3"), graphs=True))
