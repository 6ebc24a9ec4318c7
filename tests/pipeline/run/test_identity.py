"""A stage belongs to its prompts as rendered: after an edited template, or on another day, it is not done before."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_models, make_run

from tropd.pipeline.problems import encoding
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import with_template_date
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.storage.errors import FingerprintMismatchError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import read_manifest, write_manifest

CHAT = "[evaluation]\nlimit = 3\n[run]\nseed = 1\n"
USER = "{{ messages[0].content }}"


class Listening:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.infos: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(SILENT, name)

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def info(self, message: str) -> None:
        self.infos.append(message)


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return with_template(make_models(tmp_path / "models"), USER)


def chatting(folder: Path, models: Path) -> tuple[Run, Listening]:
    run = make_run(folder, models, prompts=4, extra=CHAT)
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"chat": True})})
    said = Listening()
    return replace(run, resolved=replace(run.resolved, config=config), reporter=said), said


def test_an_edited_chat_template_is_not_done_before(tmp_path: Path, models: Path) -> None:
    run, said = chatting(tmp_path / "run", models)
    generate_prefixes(run)
    evaluate(run, whom=("before", "teacher"))
    generate_prefixes(run)
    evaluate(run, whom=("before", "teacher"))
    assert sum("done before" in line for line in said.infos) == 2
    with_template(models, "1+" + USER)
    with pytest.raises(FingerprintMismatchError, match=r"\n    data\.prompts as token ids: '"):
        generate_prefixes(run)
    with pytest.raises(FingerprintMismatchError) as caught:
        evaluate(run, whom=("before", "teacher"))
    for field in ("before.data.evaluation as token ids", "teacher.data.evaluation as token ids"):
        assert f"    {field}: '" in str(caught.value)
    with_template(models, "{# a comment #}" + USER)
    generate_prefixes(run)  # the model sees the same


def test_a_dated_template_says_the_day_on_which_the_workspace_first_used_it(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = [datetime.date(2025, 3, 7)]
    monkeypatch.setattr(encoding, "today", lambda: day[0])
    with_template(models, "{{ strftime_now('%d') }}" + USER)
    run, said = chatting(tmp_path / "run", models)
    manifest = generate_prefixes(run)
    assert manifest.fields["data.template_date"] == "2025-03-07"
    assert any("2025-03-07 in this workspace from now on" in line for line in said.infos)
    day[0] += datetime.timedelta(days=1)
    assert generate_prefixes(run).fingerprint == manifest.fingerprint
    assert with_template_date(run).config.data.template_date == datetime.date(2025, 3, 7)
    other, _ = chatting(tmp_path / "other", models)
    assert generate_prefixes(other).fields["data.template_date"] == "2025-03-08"
    marker = run.workspace.root / "workspace.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"template_date": "2025-03-09"}))
    with pytest.raises(FingerprintMismatchError, match=r"data\.template_date: '2025-03-07' → '2025-03-09'"):
        generate_prefixes(run)


def test_what_an_older_version_made_is_kept_with_a_warning(tmp_path: Path, models: Path) -> None:
    run, said = chatting(tmp_path / "run", models)
    generate_prefixes(run)
    folder = run.workspace.stage("prefixes")
    made = read_manifest(folder)
    assert made is not None
    old = {n: v for n, v in made.fields.items() if "as token ids" not in n}
    write_manifest(folder, made.model_copy(update={"fields": old, "fingerprint": Fingerprint(old).digest}))
    assert generate_prefixes(run).fields == old
    assert len(said.warnings) == 1
    assert "did not record data.prompts as token ids" in said.warnings[0]
    write_manifest(
        folder,
        made.model_copy(update={"fields": old | {"run.seed": 5}, "fingerprint": Fingerprint(old).digest}),
    )
    with pytest.raises(FingerprintMismatchError, match=r"inputs:\n    run\.seed: 5 → 1( \(.*\))?\n  →"):
        generate_prefixes(run)
