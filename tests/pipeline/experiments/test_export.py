"""What one ships: the student's files as they are, with a card that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_runs import make_models, make_run

from tropd.pipeline.experiments.export import export_to, push
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError, DamagedShardError, TropdError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage

FIELDS = {
    "train.steps": 7,
    "train.learning_rate": 1e-3,
    "student.weights": "ab" * 32,
    "teacher.weights": "cd" * 32,
}
DISTANCE = {
    who: {
        "reverse_kl": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1},
        "forward_kl": {"mean": mean + 1, "low": mean, "high": None},
        "acceptance": {"mean": 0.5, "low": 0.4, "high": 0.6},
        "length": {"mean": 20.04, "low": 19.0, "high": 21.0},
        "prompts": 64,
        "method": "exact",
    }
    for who, mean in (("before", 3.25), ("after", 0.75))
}


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run whose student is there, with generation settings and a chat template of its own."""
    models = make_models(tmp_path / "tiny")
    card = "---\nlicense: apache-2.0\nbase_model: owner/base\n---\nA model.\n"
    (models / "README.md").write_text(card)
    run = make_run(tmp_path / "run", models, extra="[train]\nsteps = 9\nlearning_rate = 1e-3\n")
    folder = run.workspace.stage("train")
    with open_stage(folder, "train", Fingerprint(FIELDS)) as stage:
        make_models(folder / "final", seed=1)
        (folder / "final" / "chat_template.jinja").write_text("{{ messages }}")
        stage.commit("final", rows=7)
        stage.finish(steps=7)
    with open_stage(run.workspace.stage("eval"), "eval", Fingerprint({})) as stage:
        stage.finish(distance=DISTANCE)
    return run


def test_a_folder_holds_the_student_and_a_card(trained: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    final = trained.workspace.stage("train") / "final"
    before = content_digest(final)
    folder = export_to(trained, tmp_path / "out")
    names = {path.name for path in final.iterdir()}
    assert {path.name for path in folder.iterdir()} == {*names, "README.md"}
    assert all((folder / name).read_bytes() == (final / name).read_bytes() for name in names)
    assert {"generation_config.json", "chat_template.jinja"} <= names
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert content_digest(final) == before
    assert "README.md" not in names


def test_the_card_says_what_was_done(trained: Run, tmp_path: Path) -> None:
    card = ModelCard.load(export_to(trained, tmp_path / "out") / "README.md")
    card.data.to_yaml()
    assert card.data.base_model == ["owner/base"]
    assert card.data.license == "apache-2.0"
    assert "tropd" in (card.data.tags or [])
    text = " ".join(card.text.split())
    for words in (
        "`tiny`, made from [owner/base](https://huggingface.co/owner/base)",
        "ab" * 32,
        "cd" * 32,
        "Trust region: K1 on trusted tokens",
        "min(pi_T/pi_S, 1)",
        "64 held-out prompts",
        "| student before | 3.250 [3.150, 3.350] | 4.250 | 0.500 [0.400, 0.600] | 20.0 [19.0, 21.0] |",
        "| this model | 0.750 [0.650, 0.850] |",
        "| `train.learning_rate` | `0.001` |",
        "| `train.steps` | `7` |",  # what training ran with, whatever the file says
        "tropd train -w run --set 'train.steps=7'",
        "2606.01249",
        'name = "tropd"',
    ):
        assert words in text, f"{words!r} is not in:\n{card.text}"
    assert "objective.trust" not in text  # part of the method
    assert str(tmp_path) not in text.split("## How to reproduce")[0]


def test_cards_without_metadata_and_models_that_are_away(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "README.md").write_text("No metadata.\n")
    card = ModelCard.load(export_to(trained, tmp_path / "one") / "README.md")
    assert card.data.base_model is None
    assert card.data.license is None
    assert "not stated" in card.text
    (tmp_path / "tiny").rename(tmp_path / "elsewhere")
    assert (export_to(trained, tmp_path / "two") / "README.md").read_text() == (
        tmp_path / "one" / "README.md"
    ).read_text()


def test_what_is_there_is_not_written_over(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_to(trained, tmp_path / "out")  # an empty folder is as good as none
    kept = content_digest(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        export_to(trained, tmp_path / "out")
    assert content_digest(tmp_path / "out") == kept
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export_to(trained, tmp_path / "file")


def test_only_a_whole_finished_student_is_exported(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(TropdError, match="was not run"):
        export_to(make_run(tmp_path / "new", tmp_path / "tiny"), tmp_path / "out")
    weights = trained.workspace.stage("train") / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedShardError):
        export_to(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub:
    """Takes what is uploaded."""

    def __init__(self, token: str, fail: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = [("token", token)]
        self.fail = fail

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        if self.fail:
            raise OSError("no route")
        self.calls.append((name, private))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    def upload_file(
        self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str, commit_message: str
    ) -> None:
        self.calls.append((path_in_repo, path_or_fileobj.decode()))


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_unless_it_is_said(
    trained: Run, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hubs: list[Hub] = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hubs.append(Hub(token)) or hubs[-1])
    assert push(trained, "me/student", public=public) == "https://huggingface.co/me/student"
    token, made, files, card = hubs[0].calls
    assert token == ("token", "secret")
    assert made == ("me/student", not public)
    assert "model.safetensors" in files[1]
    assert card[0] == "README.md"
    assert ModelCard(card[1]).data.license == "apache-2.0"


def test_a_push_needs_a_token_a_name_and_a_network(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token") as caught:
        push(trained, "me/student")
    assert "HF_TOKEN" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="not a name on the hub"):
        push(trained, "student")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: Hub(token, fail=True))
    with pytest.raises(TropdError, match="me/student cannot be pushed: no route"):
        push(trained, "me/student")
