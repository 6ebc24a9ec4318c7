"""Loading models, telling tokenizers apart, and taking causal LMs to pieces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.models import loading as models_module
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.loading import (
    check_lengths,
    check_model,
    load_generation_config,
    load_model,
    load_tokenizer,
    stop_token_ids,
    weights_digest,
)
from tropd.pipeline.models.output.output_layer import split_model
from tropd.pipeline.models.runtime import pick_device
from tropd.pipeline.models.tokenizers import check_tokenizers, tokenizer_identity
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.workspace import Workspace

SIZE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZE, **HEADS, tie_word_embeddings=True),
        Qwen3Config(**SIZE, **HEADS, tie_word_embeddings=False),
        LlamaConfig(**SIZE, **HEADS),
        Gemma2Config(**SIZE, **HEADS, final_logit_softcapping=5.0),
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        GraniteConfig(**SIZE, num_attention_heads=2, num_key_value_heads=2, logits_scaling=3.0),
    ],
    ids=["qwen3-tied", "qwen3-untied", "llama", "gemma2-softcap", "gpt2", "granite-scaled-logits"],
)
def test_backbone_and_head_give_the_models_own_logits(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        ids = torch.arange(12).reshape(2, 6)
        mask = torch.ones_like(ids)
        split = split_model(model)
        found = split.logits(split.hidden(input_ids=ids, attention_mask=mask))
        assert torch.allclose(found, model(input_ids=ids, attention_mask=mask).logits, atol=1e-4)


def save(tiny_model: Any, folder: Path, **options: Any) -> Path:
    tiny_model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_models_are_read_from_safetensors_only(tiny_model: Any, tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "w")
    folder = save(tiny_model, workspace.root / "m")
    assert model_directory(workspace, ModelConfig(model="m"), "student") == folder
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight)
    digest = weights_digest(folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    torch.save(tiny_model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"student\.model.*no \*\.safetensors"):
        model_directory(workspace, ModelConfig(model="m"), "student")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        load_model(folder, dtype="float32", device=torch.device("cpu"))
    assert len(digest) == 64


def test_truncated_weights_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tiny_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    for size in (weights.stat().st_size - 1, 100, 0):
        with weights.open("r+b") as stream:
            stream.truncate(size)
        with pytest.raises(DataError, match=f"weights in {folder} cannot be read"):
            load_model(folder, dtype="float32", device=torch.device("cpu"))


def test_missing_models_and_tokenizers_are_named(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "w")
    with pytest.raises(ConfigError, match=r"teacher\.model = 'models/x'.*does not exist"):
        model_directory(workspace, ModelConfig(model="models/x"), "teacher")
    (workspace.root / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model_directory(workspace, ModelConfig(model="empty"), "teacher")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(workspace.root / "empty")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "nosuch"}, "model type `nosuch`"),
        ({"model_type": None}, "model type `None`"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"model_type": "vit"}, "ViTConfig"),
    ],
)
def test_configurations_of_no_known_model_are_refused(
    values: dict[str, Any], words: str, tiny_model: Any, tmp_path: Path
) -> None:
    folder = save(tiny_model, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))
    for load in (
        lambda: check_model(folder, load_tokenizer(folder)),
        lambda: load_model(folder, dtype="float32", device=torch.device("cpu")),
    ):
        with pytest.raises(ConfigError, match=rf"config\.json describes no causal .*{words}"):
            load()


def test_a_tokenizer_has_no_more_tokens_than_the_model_rows(tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tiny_model, tmp_path)
    tokenizer = load_tokenizer(folder)
    check_model(folder, tokenizer)
    tokenizer.add_tokens(["[NEW]"])
    with pytest.raises(ConfigError, match="has token ids up to 24, its model only rows for ids up to 23"):
        check_model(folder, tokenizer)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("eos", [24, -1, True, "1", 1.5, [1, 24], [1, None], {"a": 1}])
def test_stop_ids_are_tokens(eos: Any, file: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tiny_model, tmp_path)
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / file).read_text()) if file == "config.json" else {}
    (folder / file).write_text(json.dumps(content | {"eos_token_id": eos}))
    with pytest.raises(ConfigError, match=r"eos_token_id|config\.json"):
        check_model(folder, load_tokenizer(folder))
    (folder / file).write_text(json.dumps(content | {"eos_token_id": [1, 5]}))
    check_model(folder, load_tokenizer(folder))
    assert stop_token_ids(load_generation_config(folder), load_tokenizer(folder)) == {1, 5}


def test_broken_tokenizers_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tiny_model, tmp_path)
    for text in ("{", '{"model": {"type": "BPE"}}', "[]"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ConfigError, match="no readable tokenizer"):
            load_tokenizer(folder)


def test_models_are_loaded_in_one_place() -> None:
    """What loads models elsewhere would not see what is missing of them."""
    root = Path(models_module.__file__).parents[2]
    files = [path for name in ("pipeline", "cli", "storage") for path in (root / name).rglob("*.py")]
    assert len(files) > 100
    loading = {path.name for path in files if re.search(r"\.from_(pretrained|config)\(", path.read_text())}
    # And a file of a checked digest that is not in Hugging Face format is converted.
    assert loading == {"loading.py", "whole_models.py", "smollm2.py"}


def other_tokenizer(vocab: dict[str, int]) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")), eos_token="e"
    )


def test_tokenizers_are_compared_by_content() -> None:
    one = other_tokenizer({"a": 0, "b": 1, "e": 2})
    check_tokenizers(one, other_tokenizer({"a": 0, "b": 1, "e": 2}))
    with pytest.raises(ConfigError, match=r"'b': student 1, teacher 2(.|\n)*'e': student 2, teacher 1"):
        check_tokenizers(one, other_tokenizer({"a": 0, "b": 2, "e": 1}))
    with pytest.raises(ConfigError, match=r"'c': student None, teacher 3"):
        check_tokenizers(one, other_tokenizer({"a": 0, "b": 1, "e": 2, "c": 3}))


def test_padded_rows_of_the_output_layer_are_not_part_of_the_identity(tiny_model: Any) -> None:
    # The model's size plays no part: only what its tokenizer says.
    assert tokenizer_identity(make_tokenizer()) == tokenizer_identity(make_tokenizer())


def test_lengths_and_devices_are_checked() -> None:
    check_lengths(100, 40, 60)
    with pytest.raises(ConfigError, match="101 tokens, but the model takes 100"):
        check_lengths(100, 41, 60)
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA"):
            pick_device("cuda")
