"""The page: well-formed, self-contained, safe with any model output, and without errors in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.report.collect import build_report
from tropd.pipeline.report.curves import CURVES
from tropd.pipeline.report.page import duration, headline, human_bytes, points, write_report
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]
VOID = {"meta", "link", "br", "hr", "img", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Checker(HTMLParser):
    """Nesting, ids and text of a page; SVG's self-closing elements are handled by ``handle_startendtag``."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "clip-path", "style"):
                self.references += re.findall(r"url\(#([^)]*)\)", value or "")
                self.references += [value[1:]] if value and value.startswith("#") else []
            assert not name.startswith("on"), f"{name} on <{tag}>"

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: Path) -> Checker:
    html = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids)), "ids are unique in the page"
    assert set(checker.references) <= set(checker.ids), "every reference has its target"
    assert "script" not in checker.tags
    assert not re.search(r"https?://", html), "nothing is fetched, not even named"
    assert not re.search(r"@import|@font-face|url\((?!#)", html)
    assert not {"iframe", "object", "embed", "img"} & set(checker.tags)
    return checker


def text_of(page: Path) -> str:
    return " ".join(" ".join(check(page).text).replace("\u00a0", " ").split())


def test_a_finished_run(finished: Workspace) -> None:
    page = write_report(finished)
    assert page == finished.root / "report" / "index.html"
    text = text_of(page)
    assert "What is missing" not in text
    for words in ("The student went from", "Teacher cache", "67,527", "Where the time went", "expected 6"):
        assert words in text
    with_data = [curve for curve in CURVES if curve.group != "more"]
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


HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">&amp;{{ 7*7 }}\x00\x1b[31m\r\u202e'


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
    (root / "config.toml").write_text(f"[run]\nrecipe = {json.dumps(HOSTILE)}\n")
    page = write_report(empty_workspace)
    html = page.read_text(encoding="utf-8")
    text = text_of(page)
    assert "<script>alert(1)</script>" in text, "shown as text"
    assert "{{ 7*7 }}" in text
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "␀␛[31m" in text


def test_an_empty_workspace(empty_workspace: Workspace) -> None:
    text = text_of(write_report(empty_workspace))
    assert "This run has not been evaluated yet." in text
    assert "train: train has not been run" in text


def test_an_unfinished_run(empty_workspace: Workspace, tools: Tools) -> None:
    root = empty_workspace.root
    tools["write_stage"](root, "train", {}, complete=False)
    tools["write_metrics"](root, tools["metric_rows"](1))
    text = text_of(write_report(empty_workspace))
    assert "train: stage is not finished (step 1 of 100)" in text
    assert "Gradient norm" in text


@pytest.mark.parametrize(
    "name", ["config.toml", "train/manifest.json", "eval/manifest.json", "train/metrics.jsonl"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage"])
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
        return headline(build_report(empty_workspace).evaluation).replace("\u00a0", " ")

    assert re.fullmatch(
        r"The student went from [\d.]+ % to [\d.]+ % of sampled answers right; the teacher has [\d.]+ %\.",
        said(before="before", after="after", teacher="teacher"),
    )
    assert said(before="after", after="before").startswith("The student fell from")
    assert said(before="before").startswith("Before training the student has")
    assert said(after="after").startswith("The trained student has")


def test_numbers_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 611_000, 1.5e9, 2e15)] == [
        "0\u00a0bytes",
        "999\u00a0bytes",
        "1\u00a0kB",
        "611\u00a0kB",
        "1.5\u00a0GB",
        "2e+03\u00a0TB",
    ]
    assert [duration(s) for s in (0.04, 59.94, 59.99, 145.4, 3599.7, 7800)] == [
        "0.0\u00a0s",
        "59.9\u00a0s",
        "1\u00a0min 0\u00a0s",
        "2\u00a0min 25\u00a0s",
        "1\u00a0h 0\u00a0min",
        "2\u00a0h 10\u00a0min",
    ]
    assert (points(0.342), points(-0.01)) == ("+34.2", "−1.0")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_errors_and_without_sideways_scrolling(
    finished: Workspace, tmp_path: Path, width: int
) -> None:
    page = write_report(finished)
    # The page forbids scripts, so its size is read from a page around it that allows them.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe><p id="r"></p>'
        '<script>onload = () => { const d = document.getElementById("f").contentDocument.documentElement;'
        'document.getElementById("r").textContent = "measured " + d.scrollWidth + " svg " + '
        'd.querySelectorAll("svg").length; }</script>'
    )
    assert CHROMIUM is not None
    result = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    measured = re.search(r"measured (\d+) svg (\d+)", result.stdout)
    assert measured is not None, result.stdout[-500:]
    assert int(measured[1]) <= width
    assert int(measured[2]) >= 15
