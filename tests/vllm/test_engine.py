"""vLLM's engine against transformers' on the same tiny model. Runs where vLLM is installed: ``make test-vllm``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment that has it")

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tropd.pipeline.config.sections.model_settings import VllmConfig
from tropd.pipeline.models.engines.base import Sampling, SequenceScores
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.engines.vllm import VllmEngine
from tropd.storage.errors import ConfigError

V, LONGEST = 24, 64
TOLERANCE = 1e-4


def make_model(tied: bool, biased: bool = False) -> Any:
    """Heads of 32, the smallest that vLLM's CPU attention takes; ``biased``: queries, keys and values, as in Qwen2."""
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
        "max_position_embeddings": LONGEST,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    if not biased:
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32)).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    return model


def open_engine(folder: Path, **options: Any) -> VllmEngine:
    return VllmEngine(
        folder, [1], VllmConfig(), dtype="float32", num_tokens=V, max_length=LONGEST, most_topk=8, **options
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(tied=True)


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return open_engine(folder)


@pytest.fixture(scope="module")
def reference(model: Any) -> TransformersEngine:
    return TransformersEngine(model, [1])


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, V, size=n).tolist() for n in (2, 5, 9, 20, 33, LONGEST - 1)]


def assert_same(found: list[SequenceScores], expected: list[SequenceScores]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE)
        np.testing.assert_array_equal(one.topk_positions, other.topk_positions)
        assert one.topk_ids.shape == other.topk_ids.shape
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=TOLERANCE)
        different = one.topk_ids != other.topk_ids
        gaps = np.abs(np.diff(other.topk_logprobs, axis=1)) if other.topk_logprobs.shape[1] > 1 else None
        if gaps is not None and different.any():  # only where the order is a matter of rounding
            assert gaps.min() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 5},
        {"k": V},
        {"k": 5, "vocab_limit": 20},
        {"k": 5, "topk_where": lambda index, sampled, entropy: sampled < -3.0},
        {"k": 5, "topk_where": lambda index, sampled, entropy: np.arange(len(sampled)) == index},
        {"k": 5, "topk_where": lambda index, sampled, entropy: np.zeros(len(sampled), dtype=bool)},
    ],
    ids=["own", "top 5", "all", "below 20", "outliers", "one each", "none"],
)
def test_scores_are_those_of_transformers(
    engine: VllmEngine, reference: TransformersEngine, sequences: list[list[int]], options: dict[str, Any]
) -> None:
    if options.get("k") == V:
        options = {**options, "k": 8}
    for starts in ([1] * len(sequences), [len(s) // 2 for s in sequences], [len(s) for s in sequences]):
        assert_same(engine.score(sequences, starts, **options), reference.score(sequences, starts, **options))


def test_greedy_responses_are_those_of_transformers(
    engine: VllmEngine, reference: TransformersEngine, sequences: list[list[int]]
) -> None:
    prompts = [s[:4] for s in sequences]
    options: dict[str, Any] = {"seeds": list(range(len(prompts))), "max_tokens": [3, 30, 30, 30, 30, 30]}
    found = engine.generate(prompts, Sampling(0.0), **options)
    expected = reference.generate(prompts, Sampling(0.0), **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9)])
def test_samples_depend_on_their_seed_and_report_raw_logprobs(
    engine: VllmEngine, reference: TransformersEngine, sequences: list[list[int]], sampling: Sampling
) -> None:
    prompts = [s[:3] for s in sequences]
    seeds, limits = [10 + i for i in range(len(prompts))], [20] * len(prompts)
    found = engine.generate(prompts, sampling, seeds=seeds, max_tokens=limits)
    backwards = engine.generate(prompts[::-1], sampling, seeds=seeds[::-1], max_tokens=limits)
    assert [g.tokens for g in found] == [g.tokens for g in backwards[::-1]]
    other = engine.generate(prompts, sampling, seeds=[s + 1000 for s in seeds], max_tokens=limits)
    assert [g.tokens for g in found] != [g.tokens for g in other]
    for prompt, generation in zip(prompts, found, strict=True):
        (scored,) = reference.score([[*prompt, *generation.tokens]], [len(prompt)])
        np.testing.assert_allclose(generation.logprobs, scored.token_logprobs, atol=TOLERANCE)
        assert (generation.tokens[-1] == 1) == (generation.finish_reason == "stop")
        assert 1 not in generation.tokens[:-1]


def test_rows_are_told_of_while_others_are_written(engine: VllmEngine, sequences: list[list[int]]) -> None:
    prompts = [s[:3] for s in sequences]
    options: dict[str, Any] = {"seeds": list(range(len(prompts))), "max_tokens": [20, 2, 30, 1, 20, 5]}
    expected = engine.generate(prompts, Sampling(), **options)
    told: list[tuple[int, Any]] = []
    found = engine.generate(
        prompts, Sampling(), **options, finished=lambda number, one: told.append((number, one))
    )
    assert found == expected
    assert sorted(told, key=lambda one: one[0]) == list(enumerate(expected))
    lengths = [len(generation.tokens) for _, generation in told]
    assert lengths == sorted(lengths)  # all begin together, so shorter ones end first


def test_sequences_of_full_length(engine: VllmEngine) -> None:
    longest = engine.max_length
    assert longest == LONGEST - 1
    (full,) = engine.generate([[3] * longest], Sampling(), seeds=[0], max_tokens=[5])
    assert (full.tokens, full.finish_reason) == ([], "length")
    (nearly,) = engine.generate([[3] * (longest - 2)], Sampling(0.0), seeds=[0], max_tokens=[5])
    assert 1 <= len(nearly.tokens) <= 2
    with pytest.raises(ValueError, match=f"{LONGEST} tokens, the engine takes {longest}"):
        engine.score([[3] * LONGEST], [1])
    with pytest.raises(ValueError, match="outside 0"):
        engine.score([[3, V]], [1])


def test_entropy_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match="entropy"):
        engine.score([[3, 4]], [1], entropy=True)


# Tests with an engine of their own come last: where one ends, the module's cannot go on.
def test_rows_that_are_no_tokens_play_no_part(model: Any, tmp_path: Path, sequences: list[list[int]]) -> None:
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(V + 40, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[V:].normal_(0.0, 0.4, generator=torch.Generator().manual_seed(0))
    padded.save_pretrained(tmp_path)
    engine, reference = open_engine(tmp_path), TransformersEngine(padded, [1], num_tokens=V)
    starts, prompts = [1] * len(sequences), [s[:3] for s in sequences]
    assert_same(engine.score(sequences, starts, k=5), reference.score(sequences, starts, k=5))
    options: dict[str, Any] = {"seeds": range(len(prompts)), "max_tokens": [20] * len(prompts)}
    unlimited = TransformersEngine(padded, [1]).generate(prompts, Sampling(), **options)
    assert max(token for g in unlimited for token in g.tokens) >= V
    for sampling in (Sampling(0.0), Sampling(), Sampling(1.5, 0.95)):
        for prompt, found in zip(prompts, engine.generate(prompts, sampling, **options), strict=True):
            assert max(found.tokens) < V
            (scored,) = reference.score([[*prompt, *found.tokens]], [len(prompt)])
            np.testing.assert_allclose(found.logprobs, scored.token_logprobs, atol=TOLERANCE)


def test_a_student_reports_what_its_tokens_were_drawn_from(
    model: Any, reference: TransformersEngine, sequences: list[list[int]], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    engine = open_engine(tmp_path, in_training=True)
    engine.set_weights(model.state_dict().items())
    prompts = [s[:3] for s in sequences]
    options: dict[str, Any] = {"seeds": list(range(len(prompts))), "max_tokens": [20] * len(prompts)}
    plain = engine.generate(prompts, Sampling(), **options)
    assert all(generation.drawn_logprobs is None for generation in plain)
    for prompt, found in zip(prompts, engine.generate(prompts, Sampling(0.7, 0.8), **options), strict=True):
        sequence = [*prompt, *found.tokens]
        (scored,) = reference.score([sequence], [len(prompt)])
        np.testing.assert_allclose(found.logprobs, scored.token_logprobs, atol=TOLERANCE)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1].double()
        ordered, order = torch.softmax(logits / 0.7, -1).sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= 0.8] = 0.0
        nucleus = torch.zeros_like(logits).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
        expected = nucleus.gather(-1, torch.tensor(found.tokens).unsqueeze(-1)).squeeze(-1).log()
        np.testing.assert_allclose(found.drawn_logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize(("tied", "biased"), [(True, False), (False, False), (True, True)])
def test_after_each_update_the_weights_are_the_trainers(
    tied: bool, biased: bool, tmp_path: Path, sequences: list[list[int]]
) -> None:
    model = make_model(tied, biased)
    model.save_pretrained(tmp_path)
    engine, reference = open_engine(tmp_path, in_training=True), TransformersEngine(model, [1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    starts, prompts = [1] * len(sequences), [s[:2] for s in sequences]
    before = None
    for _ in range(6):
        engine.set_weights(model.state_dict().items())
        # The same prompts in every round: with prefixes cached under the old weights this would fail.
        assert_same(engine.score(sequences, starts, k=4), reference.score(sequences, starts, k=4))
        for prompt, generation in zip(
            prompts,
            engine.generate(prompts, Sampling(), seeds=[1] * len(prompts), max_tokens=[12] * len(prompts)),
            strict=True,
        ):
            (scored,) = reference.score([[*prompt, *generation.tokens]], [len(prompt)])
            np.testing.assert_allclose(generation.logprobs, scored.token_logprobs, atol=TOLERANCE)
        after = copy.deepcopy(model.lm_head.weight.detach())
        assert before is None or float((after - before).abs().max()) > 1e-3
        before = after
        ids = torch.tensor([sequences[4]])
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
