"""A model's folder is read whole, or refused by the name of the file that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.loading import weights_digest
from tropd.pipeline.models.model_files import (
    check_files,
    check_for_vllm,
    first_names,
    read_tensors,
    tensor_shapes,
    weight_files,
)
from tropd.storage.errors import ConfigError, DataError, TropdError
from tropd.storage.workspace import Workspace

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    return tmp_path / "m"


def test_shards_are_those_of_the_index(folder: Path, tiny_model: Any) -> None:
    (folder / "consolidated.safetensors").write_text("the same, in the format of its authors")
    check_files(folder)
    assert len(weight_files(folder)) == 3
    shapes = tensor_shapes(folder)
    state = tiny_model.state_dict()
    assert shapes == {name: tuple(state[name].shape) for name in state if name != "lm_head.weight"}
    (norm,) = read_tensors(folder, ("model.norm.weight",))
    assert norm.equal(state["model.norm.weight"])
    check_for_vllm(folder)


def rewritten(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def removed(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (removed("config.json"), ConfigError, r"has no config\.json"),
        (rewritten("config.json", "{"), DataError, r"config\.json is not JSON"),
        (rewritten("config.json", "[" * 100_000), DataError, r"config\.json is not JSON"),
        (rewritten("config.json", "[1]"), DataError, r"config\.json holds a list, not a JSON object"),
        (rewritten("generation_config.json", "\0"), DataError, r"generation_config\.json is not JSON"),
        (
            rewritten("generation_config.json", "3"),
            DataError,
            r"generation_config\.json holds a \w+, not a JSON object",
        ),
        (rewritten("adapter_config.json", "{}"), ConfigError, "holds an adapter"),
        (removed(SHARDS[1]), DataError, f"lacks 1 of the 3 weight files that .*: {SHARDS[1]}"),
        (removed(INDEX), ConfigError, f"neither model.safetensors nor {INDEX}, only {SHARDS[0]}, "),
        (rewritten(INDEX, "{}"), DataError, "weight_map is not an object"),
        (rewritten(INDEX, '{"weight_map": {"a": 1}}'), DataError, "weight_map is not an object"),
        (rewritten("model.safetensors", ""), ConfigError, f"{INDEX} does not name: model.safetensors"),
        (rewritten("model-00004-of-00004.safetensors", ""), ConfigError, "does not name: model-00004"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, damage: Callable[[Path], None], error: type[TropdError], words: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as found:
        check_files(folder)
    assert found.value.hint
    workspace = Workspace.create(folder.parent / "w")
    with pytest.raises(error, match=rf"teacher\.model: .*{words}"):
        model_directory(workspace, ModelConfig(model=str(folder)), "teacher")


def test_an_old_shard_beside_whole_weights_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    check_files(tmp_path)
    (tmp_path / SHARDS[0]).touch()
    with pytest.raises(ConfigError, match=r"are not read beside model\.safetensors: model-00001"):
        check_files(tmp_path)


def test_vllm_reads_more_than_the_weights(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    check_for_vllm(tmp_path)
    (tmp_path / "other.safetensors").touch()
    check_files(tmp_path)
    with pytest.raises(ConfigError, match=r"vLLM would read other\.safetensors"):
        check_for_vllm(tmp_path)


def test_the_digest_is_of_all_that_could_be_read(folder: Path) -> None:
    before = weights_digest(folder)
    weights_digest.cache_clear()
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {}}))
    assert weights_digest(folder) == before
    (folder / "consolidated.safetensors").touch()
    weights_digest.cache_clear()
    assert weights_digest(folder) != before


def test_few_names_are_listed() -> None:
    assert first_names({"b", "a"}) == "a, b"
    assert first_names("edcba") == "a, b, c and 2 more"
