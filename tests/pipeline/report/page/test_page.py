"""The page: well-formed, self-contained, safe with any model output, and without errors in a browser."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import pytest
from page_checks import HOSTILE, text_of

from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.page.page import write_report
from tropd.pipeline.report.plots.curves import CURVES
from tropd.storage.formats.samples_file import StepSample
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]


def test_a_finished_run(finished: Workspace) -> None:
    page = write_report(finished)
    assert page == finished.root / "report" / "index.html"
    text = text_of(page)
    assert "What is missing" not in text
    for words in (
        "The student came closer to the teacher: reverse KL 0.60",
        "Teacher cache",
        "67,527",
        "Where the time went",
        "Phases of the training steps",
        "its GPU idle: 6.5 %, 16.1 %.",
        "expected 6",
    ):
        assert words in text
    # This run has no rewards, and no extrapolation.
    absent = ("reward", "extrapolation")
    with_data = [curve for curve in CURVES if curve.group != "more" and curve.name not in absent]
    for curve in with_data:
        assert curve.title in text
    assert "clip_fraction" in text, "a metric that nobody described is shown under its name"
    written = json.loads((finished.root / "report" / "report.json").read_text())
    assert written == json.loads(build_report(finished).model_dump_json())


def test_every_plot_is_a_file_too(finished: Workspace) -> None:
    write_report(finished)
    folder = finished.root / "report" / "plots"
    names = {path.stem for path in folder.glob("*.svg")}
    assert {"outcome", "accuracy", "regions", "acceptance", "k1", "grad_norm", "teacher_bytes"} <= names
    assert names == {path.stem for path in folder.glob("*.png")}
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(finished: Workspace) -> None:
    folder = finished.root / "report"

    def content() -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    write_report(finished)
    first = content()
    write_report(finished)
    assert content() == first
    assert not [name for name in first if ".tmp-" in name]


def test_model_output_is_escaped(empty_workspace: Workspace, tools: Tools) -> None:
    root = empty_workspace.root
    parts = {}
    for who in ("before", "after", "teacher"):
        rows = tools["evaluation_rows"](who, 6)
        fields = ("response", "answer", "expected", "finish_reason")
        parts[who] = [
            {**row, **dict.fromkeys(fields, HOSTILE), "prompt_id": HOSTILE + str(i)}
            for i, row in enumerate(rows)
        ]
    tools["write_evaluation"](root, parts)
    rows = [{**row, HOSTILE: float(row["step"])} for row in tools["metric_rows"](3)]
    tools["write_metrics"](root, rows)
    hostile = tools["step_sample"](0, [HOSTILE, "\t", "", HOSTILE]).model_dump()
    hostile["responses"][0].update(prompt=HOSTILE, prompt_id=HOSTILE, guidance=[HOSTILE])
    tools["write_samples"](root, [StepSample.model_validate(hostile)])
    (root / "config.toml").write_text(f"[run]\nrecipe = {json.dumps(HOSTILE)}\n")
    page = write_report(empty_workspace)
    html = page.read_text(encoding="utf-8")
    text = text_of(page)
    assert "<script>alert(1)</script>" in text, "shown as text"
    assert "{{ 7*7 }}" in text
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "␀␛[31m" in text


def test_the_acceptance_map_says_what_became_of_each_token(finished: Workspace) -> None:
    page = write_report(finished)
    html, text = page.read_text(encoding="utf-8"), text_of(page)
    assert "2 tokens from the teacher" not in text
    assert "300 tokens from the teacher (the last 2 shown)" in text
    assert "500 from the student (the first 6 shown), stopped by the length limit" in text
    assert "the student’s first 400 tokens are kept" in text
    assert html.count('<span class="t"') == 8 * 5
    assert '<span class="t guidance" title="“7”\nregion\tguidance: written by the teacher">7</span>' in html
    rejected = "“=”\nregion\toutlier\nP_trust\t0\u00a0%\nstudent\t77.9\u00a0%\nteacher\t0\u00a0%\n"
    rejected += "The teacher’s most likely\n“+”\t75\u00a0%\n“1+”\t12.5\u00a0%"
    assert f'<span class="t outlier" style="--p:0" title="{rejected}">=</span>' in html
    assert ">↵</span>\n<span" in html, "a line break has no colour, and is there once"
    found = json.loads((finished.root / "report" / "report.json").read_text())["acceptance"]
    assert [f["step"] for f in found] == [0, 14, 28, 42, 57, 71, 85, 99]
    assert found[0]["p_trust_mean"] == pytest.approx(5 / 6 * 2.718281828**-0.25)
    assert [f["outlier_fraction"] for f in found] == [pytest.approx(1 / 6)] * 8
    assert (found[0]["student_tokens"], found[0]["guidance_tokens"]) == (6, 3)
    assert "acceptance_map" not in (finished.root / "report" / "report.json").read_text()


def test_partial_membership_is_said(finished: Workspace, tools: Tools) -> None:
    sample = tools["step_sample"](0).model_dump()
    sample["responses"][0]["tokens"][0].update(trust=0.25, outlier=0.75)
    tools["write_samples"](finished.root, [StepSample.model_validate(sample)])
    assert "region\ttrust region 0.25, outlier 0.75" in write_report(finished).read_text(encoding="utf-8")


def test_an_empty_workspace(empty_workspace: Workspace) -> None:
    text = text_of(write_report(empty_workspace))
    assert "This run has not been evaluated yet." in text
    assert "train: train has not been run" in text


def test_an_unfinished_run(empty_workspace: Workspace, tools: Tools) -> None:
    root = empty_workspace.root
    tools["write_stage"](root, "train", {}, complete=False)
    tools["write_metrics"](root, tools["metric_rows"](1))
    text = text_of(write_report(empty_workspace))
    assert "train: stage is not finished (step 1 of 100, none saved yet)" in text
    assert "Gradient norm" in text


GARBAGE = b"\xff\x00garbage"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", GARBAGE),
        ("train/manifest.json", b""),
        ("eval/manifest.json", GARBAGE),
        ("train/metrics.jsonl", GARBAGE),
        ("train/samples.jsonl", b""),
    ],
)
def test_damaged_files_still_give_a_page(finished: Workspace, name: str, content: bytes) -> None:
    (finished.root / name).write_bytes(content)
    assert "Responses" in text_of(write_report(finished))


def test_sparse_metrics_give_only_the_curves_there_are(empty_workspace: Workspace, tools: Tools) -> None:
    tools["write_metrics"](empty_workspace.root, [{"step": 0}, {"step": 1, "loss_trust": 0.5}])
    text = text_of(write_report(empty_workspace))
    assert "Loss of the trust region" in text
    assert "Loss of the outliers" not in text


def test_long_runs_stay_small(empty_workspace: Workspace, tools: Tools) -> None:
    rows = [{"step": step, "grad_norm": step % 7} for step in range(20_000)]
    tools["write_metrics"](empty_workspace.root, rows)
    assert write_report(empty_workspace).stat().st_size < 200_000


def test_the_headline_says_what_happened(empty_workspace: Workspace, tools: Tools) -> None:
    def said(**parts: str) -> str:
        rows = {who: tools["evaluation_rows"](like, 60) for who, like in parts.items()}
        tools["write_evaluation"](empty_workspace.root, rows)
        return build_report(empty_workspace).headline.replace("\u00a0", " ")

    assert re.fullmatch(
        r"The student went from [\d.]+ % to [\d.]+ % of sampled answers right; the teacher has [\d.]+ %\.",
        said(before="before", after="after", teacher="teacher"),
    )
    assert said(before="after", after="before").startswith("The student fell from")
    assert said(before="before", after="before").startswith("The student stayed at")
    assert said(before="before").startswith("Before training the student has")
    assert said(after="after").startswith("The trained student has")
