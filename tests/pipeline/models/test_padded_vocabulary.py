"""Rows of the output layer that are no tokens: never sampled, never scored, never trained, by any path.

The rows' weights are large, so that a path that knows nothing of the limit would show at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TINY, make_models, make_run
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.output import logprobs
from tropd.pipeline.models.output.logprobs import Lookups, token_logprobs
from tropd.pipeline.models.output.output_layer import SplitModel
from tropd.pipeline.models.output.vllm_head import keep_rows
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.run import opening
from tropd.pipeline.run.opening import load_role, role_num_tokens
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import check_token_ids, score_teacher
from tropd.pipeline.teacher.service.batcher import score_requests
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest
from tropd.pipeline.training.inputs import read_inputs, student_prompts
from tropd.pipeline.training.signal.from_cache import limited
from tropd.storage.cache.shard import TopK, read_topk
from tropd.storage.errors import DataError
from tropd.storage.formats.trajectories import read_trajectories

ROWS, TOKENS = 40, 24
CONFIGS: dict[str, Callable[[], Any]] = {
    "lean": lambda: LlamaConfig(**TINY),
    "soft cap": lambda: Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=5.0),
    "tied": lambda: GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "whole": lambda: GraniteConfig(**TINY, logits_scaling=0.5),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    with torch.no_grad():
        found.get_output_embeddings().weight[TOKENS:] *= 2.0
    return found


def logprobs_over_tokens(model: Any, sequence: list[int]) -> torch.Tensor:
    """``[T - 1, TOKENS]``."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1, :TOKENS].double()
    return torch.log_softmax(logits, dim=-1)


def chosen(model: Any, sequence: list[int], start: int) -> np.ndarray[Any, Any]:
    exact = logprobs_over_tokens(model, sequence)[start - 1 :]
    return exact.gather(-1, torch.tensor(sequence[start:]).unsqueeze(-1)).squeeze(-1).numpy()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.8, 0.95)])
def test_only_tokens_are_sampled(model: Any, sampling: Sampling) -> None:
    prompts = [[3 + n % 20, 5, 7][: 1 + n % 3] for n in range(12)]
    options: dict[str, Any] = {"seeds": range(12), "max_tokens": [10] * 12}
    unlimited = TransformersEngine(model, [1]).generate(prompts, sampling, **options)
    assert max(max(g.tokens) for g in unlimited) >= TOKENS
    engine = TransformersEngine(model, [1], num_tokens=TOKENS)
    assert engine.vocab_size == TOKENS
    for prompt, found in zip(prompts, engine.generate(prompts, sampling, **options), strict=True):
        assert max(found.tokens) < TOKENS
        exact = chosen(model, [*prompt, *found.tokens], len(prompt))
        np.testing.assert_allclose(found.logprobs, exact, atol=1e-4)


def test_scores_are_over_tokens(model: Any) -> None:
    engine = TransformersEngine(model, [1], num_tokens=TOKENS)
    sequence = [3, 4, 5, 6, 7, 8]
    exact = logprobs_over_tokens(model, sequence)
    for options in ({}, {"topk_where": lambda index, sampled, entropy: np.ones(len(sampled), dtype=bool)}):
        (found,) = engine.score([sequence], [1], k=ROWS, entropy=True, **options)
        np.testing.assert_allclose(found.token_logprobs, chosen(model, sequence, 1), atol=1e-4)
        assert found.topk_ids.shape == (5, TOKENS)
        assert found.topk_ids.max() < TOKENS
        np.testing.assert_allclose(np.exp(found.topk_logprobs).sum(axis=1), 1.0, atol=1e-4)
        np.testing.assert_allclose(found.entropy, -(exact.exp() * exact).sum(-1), atol=1e-4)
    (few,) = engine.score([sequence], [1], k=5, vocab_limit=10)
    assert few.topk_ids.max() < 10
    with pytest.raises(ValueError, match=f"outside 0 … {TOKENS - 1}"):
        engine.score([[3, TOKENS]], [1])


def test_a_service_answers_with_tokens(model: Any) -> None:
    engine = TransformersEngine(model, [1], num_tokens=TOKENS)
    item = ScoreItem(np.arange(2, 9, dtype=np.int32), 1, np.full(6, -1.0, dtype=np.float32), 0)
    request = ScoreRequest([item], AllTrusted(), "all", 30, False, ROWS)
    (answer,) = score_requests(engine, [request])[0].items
    assert answer.topk_ids.max() < TOKENS


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_what_is_no_token_is_not_trained(
    softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of an output layer without these rows."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * ROWS)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, ROWS)
    short = torch.nn.Linear(8, TOKENS)
    with torch.no_grad():
        for parameter, part in zip(head.parameters(), short.parameters(), strict=True):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
            part.copy_(parameter[:TOKENS])
    states = torch.randn(23, 8, generator=generator).requires_grad_()
    targets = torch.randint(TOKENS, (23,), generator=generator)
    counts = torch.arange(23) % 4
    ids = [torch.randperm(TOKENS, generator=generator)[:count] for count in counts.tolist()]
    lookups = Lookups(counts, torch.cat(ids), tail=True)

    def run(layer: torch.nn.Linear, limit: int | None) -> tuple[Any, tuple[torch.Tensor, ...]]:
        found = token_logprobs(SplitModel(None, layer, softcap, limit), states, targets, lookups)
        loss = (found.targets * torch.linspace(-1, 1, 23)).sum() + found.lookups.sum() + found.tail.sum()
        return found, torch.autograd.grad(loss, [states, layer.weight, layer.bias])

    found, gradients = run(head, TOKENS)
    expected, wanted = run(short, None)
    for name in ("targets", "lookups", "entropy", "overlap", "tail"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True)
    torch.testing.assert_close(gradients[0], wanted[0])
    for full, part in zip(gradients[1:], wanted[1:], strict=True):
        torch.testing.assert_close(full[:TOKENS], part)
        assert full[TOKENS:].abs().max() == 0


def test_all_rows_are_tokens_where_the_tokenizer_has_them(tiny_model: Any) -> None:
    assert TransformersEngine(tiny_model, [1], num_tokens=TOKENS).split.limit is None


def test_cached_alternatives_that_are_no_tokens_join_the_tail() -> None:
    """Caches of earlier versions hold some."""
    with np.errstate(divide="ignore"):
        data = TopK(
            offsets=np.array([0, 3], dtype=np.int64),
            counts=np.array([3, 1, 2], dtype=np.uint16),
            ids=np.array([30, 4, 5, 31, 6, 7], dtype=np.int32),
            logprobs=np.log(np.array([0.5, 0.25, 0.125, 0.5, 0.5, 0.25])).astype(np.float16),
            tail=np.log(np.array([0.125, 0.5, 0.25], dtype=np.float32)),
            teacher_logprobs=np.zeros(3, dtype=np.float32),
        )
    found = limited(data, 1, TOKENS)
    assert found.counts.tolist() == [1, 0, 1]
    assert found.ids.tolist() == [4, 6]
    np.testing.assert_allclose(np.exp(found.tail), [0.75, 1.0, 0.5], rtol=1e-3)
    everything = limited(data, 9, ROWS)
    assert everything.counts.tolist() == [3, 1, 2]
    assert everything.tail is data.tail


def padded(folder: Path, rows: int = 40) -> Path:
    """The tiny model with rows that are no tokens, and are likely."""
    make_models(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(TOKENS + rows, mean_resizing=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        model.get_output_embeddings().weight[TOKENS:].normal_(0.0, 1.0)
    model.save_pretrained(folder)
    return folder


def test_stages_with_padded_models(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", padded(tmp_path / "models"))
    assert role_num_tokens(run, "teacher") == TOKENS
    manifest = generate_prefixes(run)
    folder = run.workspace.stage("prefixes")
    tokens = [t for name in manifest.shards for row in read_trajectories(folder / name) for t in row.tokens]
    assert 0 <= max(tokens) < TOKENS
    scores = score_teacher(run)
    assert scores.fields["teacher.vocab_size"] == TOKENS
    caches = [read_topk(run.workspace.stage("scores") / n) for n in scores.shards if n.endswith(".zarr")]
    assert max(cache.ids.max() for cache in caches) < TOKENS
    loaded = load_role(run, "student")
    assert num_tokens(loaded.tokenizer) == loaded.engine(batch_size=2).vocab_size == TOKENS
    inputs = read_inputs(run, SimpleNamespace(cached_topk=True), student_prompts(run))  # type: ignore[arg-type]
    assert inputs.store is not None
    assert inputs.store.largest_id() == max(tokens)


def test_trajectories_of_earlier_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", padded(tmp_path / "models"))
    with monkeypatch.context() as earlier:
        earlier.setattr(opening, "num_tokens", lambda tokenizer: TOKENS + 40)
        generate_prefixes(run)
    words = r"hold token id \d\d, and the tokenizer has ids 0 … 23"
    with pytest.raises(DataError, match=words) as found:
        score_teacher(run)
    assert found.value.hint == f"make them again: tropd generate-prefixes -w {run.workspace.root} --force"
    with pytest.raises(DataError, match=words):
        read_inputs(run, SimpleNamespace(cached_topk=False), student_prompts(run))  # type: ignore[arg-type]
    check_token_ids(run, 23, TOKENS, "generate-prefixes")


def test_a_model_inside_vllm_computes_no_other_logits() -> None:
    class LogitsProcessor(torch.nn.Module):
        """As vLLM's, as far as it matters."""

        org_vocab_size = 32

        def _get_logits(self) -> None: ...

    model = torch.nn.ModuleDict({"logits_processor": LogitsProcessor(), "lm_head": torch.nn.Linear(2, 2)})
    assert not keep_rows(TOKENS, torch.nn.ModuleDict({"lm_head": copy.copy(model["lm_head"])}))
    for number, expected in ((TOKENS, TOKENS), (100, TOKENS)):
        assert keep_rows(number, model)
        assert model["logits_processor"].org_vocab_size == expected
