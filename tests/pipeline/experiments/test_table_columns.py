"""The columns of a table that lighteval measures: said before the first stage, with all that they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from lighteval_stand_in import make_environment

from tropd.pipeline.config.paper_tables import ELSEWHERE, load_table
from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.experiments.reproduce import Job, open_setting
from tropd.pipeline.experiments.table_columns import check_elsewhere
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.stages.evaluation import lm_eval
from tropd.pipeline.training.preflight.checks import Check


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROPD_BENCH_HARNESS", str(tmp_path / "environment"))
    for token in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(token, raising=False)
    return tmp_path


def checks(root: Path, *assignments: str, runs_here: bool = False) -> dict[str, Check]:
    table = load_table("table4", rehearse=False)
    (setting,) = table.settings
    run = open_setting(Job(root, "table4", table, False, 1, 1, assignments), setting, SILENT)
    found = check_elsewhere(run, setting, runs_here=runs_here)
    return {check.what.partition(":")[0]: check for check in found}


def test_what_is_missing_counts_where_the_table_is_about_to_be_made(nowhere: Path) -> None:
    planned = checks(nowhere)
    assert list(planned) == list(ELSEWHERE)
    gpqa = planned["GPQA-Diamond"]
    assert gpqa.holds is None
    for words in (
        "gpqa:diamond, 198 questions, avg@4; needs the environment of lighteval (make bench-harness)",
        "HF_TOKEN is not set",
        "a download from the hub, Idavidrein/gpqa",
    ):
        assert words in gpqa.what
    assert "HF_TOKEN" not in planned["IFBench"].what
    made = checks(nowhere, runs_here=True)
    assert [made[name].holds for name in ELSEWHERE] == [False, False, False, None]
    make_environment(nowhere / "environment")
    made = checks(nowhere, runs_here=True)
    assert [check.holds for check in made.values()] == [None] * 4
    data = nowhere / "qwen3" / "data"
    data.mkdir()
    for name in ("ifbench.jsonl", "ifbench.records.jsonl"):
        (data / name).touch()
    assert checks(nowhere)["IFBench"].holds is True


def test_code_is_run_only_where_it_is_allowed(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not measured" in checks(nowhere)["LiveCodeBench-v6"].what
    make_environment(nowhere / "environment")
    monkeypatch.setattr(lm_eval, "ISOLATED", ("no-such-program", "--"))
    refused = checks(nowhere, "evaluation.allow_code=true", runs_here=True)["LiveCodeBench-v6"]
    assert refused.holds is False
    assert "a process without network" in refused.what


def test_a_workspace_from_before_is_left_as_it_is_and_shown_the_lines(nowhere: Path) -> None:
    config = nowhere / "qwen3" / "config.toml"
    config.parent.mkdir()
    config.write_text(recipe_text("qwen3-sft-1.7b"))
    for name, check in checks(nowhere, runs_here=True).items():
        assert check.holds is None
        assert f'name = "{name}"' in check.what
    assert config.read_text() == recipe_text("qwen3-sft-1.7b")
