"""A model with a tensor too few, too many, or in another shape is refused before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_run
from transformers import LlamaConfig, MixtralConfig, Qwen3Config
from transformers.models.auto import modeling_auto

from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models import loading
from tropd.pipeline.models.loading import check_model, load_model, load_tokenizer
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.training.loop import train
from tropd.storage.errors import DataError

SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
Tensors = dict[str, torch.Tensor]


def save(config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modeling_auto.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_refused(folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=words) as found:
        check_model(folder, load_tokenizer(folder))
    assert str(folder) in found.value.message
    assert found.value.hint
    # The report on the loaded weights says the same, without the headers.
    with monkeypatch.context() as patched:
        patched.setattr(loading, "check_weights", lambda *_: 24)
        with pytest.raises(DataError, match=words):
            load_model(folder, dtype="float32", device=torch.device("cpu"))


def without(*parts: str) -> Callable[[Tensors], Any]:
    return lambda t: [t.pop(name) for name in list(t) if all(part in name for part in parts)]


def untie(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("layers.1", "mlp"), r"3 tensors missing \(model\.layers\.1\.mlp\.down_proj\.weight, "),
        (without("layers"), r"22 tensors missing \(.* and 19 more\)"),
        (without("embed_tokens"), r"missing \(lm_head\.weight, model\.embed_tokens\.weight\)"),
        (
            lambda t: t.update({DOWN: torch.zeros(32, 7)}),
            r"1 in another shape \(model.*is \[32, 7\] and should be \[32, 48\]",
        ),
        (
            lambda t: t.update({f"{DOWN}_scale": torch.ones(1)}),
            r"1 that it does not have \(.*down_proj\.weight_scale\)",
        ),
        (untie, r"lm_head\.weight and model\.embed_tokens\.weight are one tensor .*two different ones"),
    ],
    ids=["layer", "all layers", "embedding", "shape", "scale", "tied"],
)
def test_a_model_in_parts_is_refused(
    edit: Callable[[Tensors], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(Qwen3Config(**SIZES, **HEADS, head_dim=16, tie_word_embeddings=True), tmp_path)
    check_model(folder, load_tokenizer(folder))
    change(folder, edit)
    assert_refused(folder, words, monkeypatch)


def test_an_output_layer_that_was_the_embedding_is_asked_for(
    tmp_path: Path,
) -> None:
    folder = save(Qwen3Config(**SIZES, **HEADS, head_dim=16, tie_word_embeddings=True), tmp_path)
    set_config(folder, tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"1 tensors missing \(lm_head\.weight\)") as found:
        check_model(folder, load_tokenizer(folder))
    assert '"tie_word_embeddings": true' in str(found.value)
    set_config(folder, tie_word_embeddings=True)
    check_model(folder, load_tokenizer(folder))


def test_harmless_tensors_are_no_reason(tmp_path: Path) -> None:
    """An output layer equal to the embedding that it is tied to, and buffers that older versions have saved."""
    folder = save(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True), tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(folder, add)
    check_model(folder, load_tokenizer(folder))
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_that_the_model_joins_are_counted_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts lie in the file one by one, under other names than in the model."""
    folder = save(MixtralConfig(**SIZES, **HEADS, **EXPERTS), tmp_path)
    assert any("experts.1.w2" in name for name in load_file(folder / "model.safetensors"))
    check_model(folder, load_tokenizer(folder))
    load_model(folder, dtype="float32", device=torch.device("cpu"))
    change(folder, without("layers.0", "experts.1.w2"))
    assert_refused(folder, r"another shape \(model\.layers\.0\.mlp\.experts\.down_proj is \[1, ", monkeypatch)
    change(folder, without("layers.0", "experts", "w2"))
    assert_refused(folder, r"missing \(model\.layers\.0\.mlp\.experts\.down_proj", monkeypatch)
    change(folder, without("layers.0", "experts.1.w3"))
    with pytest.raises(DataError, match="they do not fit together"):
        check_model(folder, load_tokenizer(folder))


def test_no_stage_starts_with_half_a_teacher(tmp_path: Path, tiny_models: Path) -> None:
    """Also where the teacher's turn would come last."""
    teacher = Path(shutil.copytree(tiny_models, tmp_path / "teacher"))
    run = make_run(tmp_path / "run", tiny_models)
    config = run.config.model_copy(
        update={"teacher": run.config.teacher.model_copy(update={"model": str(teacher)})}
    )
    run = replace(run, resolved=replace(run.resolved, config=config))
    change(teacher, without("mlp"))
    for stage in (
        generate_prefixes,
        train,
        lambda run: evaluate(run, whom=("before", "teacher")),
    ):
        with pytest.raises(DataError, match=f"{teacher} are not those of a Qwen3.*3 tensors missing"):
            stage(run)
    for name in ("prefixes", "train", "eval"):
        folder = run.workspace.stage(name)
        assert not folder.exists() or not any(folder.rglob("part-*"))
        assert not (folder / "metrics.jsonl").exists()
