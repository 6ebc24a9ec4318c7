"""Several runs on one page: each with what there is of it."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_checks import HOSTILE, check, text_of
from typer.testing import CliRunner

from tropd.cli.main import app
from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.data.runs import measured_alike, run_labels
from tropd.pipeline.report.page.page import write_report
from tropd.storage.stage.manifest import read_manifest, write_manifest
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]


@pytest.fixture
def three(finished: Workspace, tmp_path: Path, tools: Tools) -> list[Workspace]:
    """A finished run, one that is being trained, and one with a damaged configuration and evaluation."""
    going = Workspace.create(tmp_path / "going")
    config = finished.config_path.read_text()
    going.config_path.write_text(config.replace('"tropd"', '"opd"').replace("seed = 3", "seed = 4"))
    tools["write_stage"](going.root, "train", {}, complete=False)
    tools["write_metrics"](going.root, tools["metric_rows"](40))
    shutil.copytree(finished.root, tmp_path / "broken")
    broken = Workspace.open(tmp_path / "broken")
    broken.config_path.write_text("not = [toml")
    (broken.root / "eval" / "part-after.parquet").write_bytes(b"")
    return [finished, going, broken]


def test_every_run_is_shown_with_what_there_is(three: list[Workspace], tools: Tools) -> None:
    runs = build_report(three[0], three[1:]).runs
    assert [run.label for run in runs] == ["run", "going", "broken"]
    assert [run.state for run in runs] == ["finished", "step 40 of 100", "damaged: eval"]
    assert [run.objective for run in runs] == ["tropd", "opd", "tropd"], "as trained, where not as configured"
    assert [run.seed for run in runs] == [3, 4, None]
    assert [run.steps for run in runs] == [100, 40, 100]
    assert [run.evaluation.accuracy("after", "sampled") is not None for run in runs] == [True, False, False]
    assert [run.evaluation.distance("after") is not None for run in runs] == [True, False, True]
    assert [len(run.series["k1_mean"]) for run in runs] == [100, 40, 100]
    rows = tools["metric_rows"](100)
    outliers = sum(row["teacher_topk_tokens"] for row in rows) / sum(row["tokens_on_policy"] for row in rows)
    assert runs[0].outlier_fraction == pytest.approx(outliers)
    assert runs[0].missing == []
    assert any("not finished" in line for line in runs[1].missing)
    assert any("config.toml" in line for line in runs[2].missing)
    page = write_report(three[0], three[1:])
    text = text_of(page)
    assert "Runs side by side" in text
    assert "step 40 of 100" in text
    assert "going lacks: prefixes" not in text
    assert "broken lacks: config:" in text
    tags = check(page).tags
    assert tags.count("input") == 3 + 8, "a checkbox per run, a button per sampled step"
    written = json.loads((three[0].root / "report" / "report.json").read_text())
    assert written == json.loads(build_report(three[0], three[1:]).model_dump_json())


def test_runs_that_were_measured_on_other_prompts_are_told(finished: Workspace, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "other")
    other = Workspace.open(tmp_path / "other")
    told = "These runs were measured on different held-out prompts"
    assert measured_alike(build_report(finished, [other]).runs)
    assert told not in text_of(write_report(finished, [other]))
    for workspace, digest in ((finished, "a" * 64), (other, "b" * 64)):
        manifest = read_manifest(workspace.root / "eval")
        assert manifest is not None
        changed = {"fields": {**manifest.fields, "data.evaluation": digest}}
        write_manifest(workspace.root / "eval", manifest.model_copy(update=changed))
        runs = build_report(finished, [other]).runs
        assert measured_alike(runs) == (workspace is finished), "of one it is not known"
    assert told in text_of(write_report(finished, [other]))


def test_runs_on_a_part_of_the_same_problems_are_told_too(
    finished: Workspace, tmp_path: Path, tools: Tools
) -> None:
    shutil.copytree(finished.root, tmp_path / "other")
    other = Workspace.open(tmp_path / "other")
    parts = {who: tools["evaluation_rows"](who, 60) for who in ("before", "after", "teacher")}
    tools["write_evaluation"](other.root, parts, distance=tools["DISTANCES"])
    assert not measured_alike(build_report(finished, [other]).runs)


def test_plots_of_all_runs_are_files_too(three: list[Workspace]) -> None:
    write_report(three[0], three[1:])
    folder = three[0].root / "report" / "plots"
    names = {path.stem for path in folder.glob("runs-*.svg")}
    metrics = ("accuracy-sampled", "loss", "grad-norm", "k1-mean", "region-fraction-outlier")
    metrics += ("student-entropy", "response-length-mean")
    assert {"runs-outcome", *(f"runs-{name}" for name in metrics)} <= names
    assert names == {path.stem for path in folder.glob("runs-*.png")}
    drawing = ElementTree.parse(folder / "runs-k1-mean.svg").getroot()
    ids = {element.get("id") for element in drawing.iter()}
    assert {"line-run-0", "line-run-1", "line-run-2"} <= ids
    texts = {element.text for element in drawing.iter() if element.tag.endswith("}text")}
    assert {"run", "going", "broken"} <= texts, "a file has a legend of its own"


def test_a_run_alone_is_no_comparison(finished: Workspace) -> None:
    for others in ([], [finished], [Workspace.open(finished.root / ".." / finished.root.name)]):
        assert build_report(finished, others).runs == []
    assert "Runs side by side" not in text_of(write_report(finished))


def test_labels_tell_runs_apart() -> None:
    paths = [Path(p) for p in ("/a/opd/seed-0", "/a/tropd/seed-0", "/a/tropd/seed-1", "/b/other")]
    assert run_labels(paths) == ["opd/seed-0", "tropd/seed-0", "seed-1", "other"]


def test_names_of_runs_are_escaped(finished: Workspace, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "|").replace("\x00", "$x^{$")
    shutil.copytree(finished.root, tmp_path / name)
    text = text_of(write_report(finished, [Workspace.open(tmp_path / name)]))
    assert "<script>alert(1)<|script>" in text


def test_the_command(three: list[Workspace], tmp_path: Path) -> None:
    first, *others = (str(workspace.root) for workspace in three)
    arguments = [part for other in others for part in ("--with", other)]
    result = CliRunner().invoke(app, ["report", "-w", first, *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert [run["label"] for run in json.loads(result.stdout)["runs"]] == ["run", "going", "broken"]
    wrong = CliRunner().invoke(app, ["report", "-w", first, "--with", str(tmp_path / "nothing")])
    assert wrong.exit_code != 0
    assert "is not a tropd workspace" in f"{wrong.exception} {wrong.output}"
