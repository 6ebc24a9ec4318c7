"""The page as its reader has it: in a browser, from disk, with mouse, keyboard and finger."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, open_browser
from page_checks import HOSTILE

from tropd.pipeline.report.page.page import write_report
from tropd.storage.formats.samples_file import StepSample
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome"
)
OUTLIER = "#map-0 p.tokens > .t.outlier"
BOX = "#token-box"
# What sticks out to the right without being inside of something that scrolls or cuts it off.
OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tools: Tools) -> Path:
    """Of a run beside another."""
    folder = tmp_path_factory.mktemp("runs")
    run = Workspace.create(folder / "run")
    tools["fill"](run)
    other = folder / "a-run-with-quite-a-long-name-as-people-give-them"
    shutil.copytree(run.root, other)
    return write_report(run, [Workspace.open(other)])


def visible(page: Page, selector: str) -> bool:
    return bool(page.value(f"document.querySelector('{selector}').getClientRects().length"))


def box_text(page: Page) -> str | None:
    return page.value(
        f"document.querySelector('{BOX}').hidden ? null : document.querySelector('{BOX}').innerText"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_loads_without_errors_and_without_sideways_scrolling(
    page: Page, report: Path, width: int, dark: bool
) -> None:
    page.open(report, width=width, dark=dark)
    page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.console == []
    assert page.value(OVERFLOWING) <= 0
    assert page.value("document.querySelectorAll('figure svg').length") >= 20
    assert page.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 27)" if dark else "rgb(246, 247, 249)"
    )


def test_hovering_over_a_token_shows_what_became_of_it(page: Page, report: Path) -> None:
    page.open(report)
    assert box_text(page) is None
    page.hover(OUTLIER)
    text = box_text(page)
    assert text is not None
    said = text.split()
    for words in (
        "“=”",
        "outlier",
        "P_trust 0 %",
        "student 77.9 %",
        "teacher 0 %",
        "“+” 75 %",
        "“1+” 12.5 %",
    ):
        assert " ".join(said).find(words) >= 0, text
    token, box = (
        page.value(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        for selector in (OUTLIER, BOX)
    )
    assert box["top"] >= token["bottom"] or box["bottom"] <= token["top"], "the box does not hide its token"
    assert box["left"] >= 0
    assert box["right"] <= 1280
    assert page.value(f"document.querySelector('{OUTLIER}').title") == "", "not a second box from the browser"
    page.hover("h1")
    assert box_text(page) is None
    assert page.console == []


def test_tokens_are_read_with_the_keyboard(page: Page, report: Path) -> None:
    page.open(report)
    page.value("document.querySelector('#map-step-0').focus()")
    page.press("Tab")
    assert "guidance" in (box_text(page) or "")
    for _ in range(2):
        page.press("ArrowRight")
    assert "“1+”" in (box_text(page) or "")
    page.press("End")
    assert "“3”" in (box_text(page) or "")
    page.press("ArrowLeft")
    assert "“↵”" in (box_text(page) or "")
    page.press("Tab")
    assert "“4”" in (box_text(page) or ""), "one stop per response"
    page.press("Escape")
    assert box_text(page) is None


def test_a_finger_opens_and_closes_the_box(page: Page, report: Path) -> None:
    page.open(report, width=390, touch=True)
    page.value("document.querySelector('#map-0 p.tokens').style.textAlign = 'right'")  # to the edge with it
    page.tap(OUTLIER)
    assert "outlier" in (box_text(page) or "")
    box = page.value(f"document.querySelector('{BOX}').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= 390
    page.tap("#acceptance h2")
    assert box_text(page) is None


def test_steps_are_chosen(page: Page, report: Path) -> None:
    page.open(report)
    shown = [visible(page, f"#map-{i}") for i in range(8)]
    assert shown == [True] + [False] * 7
    page.click("#map-step-3 + span")
    assert [visible(page, f"#map-{i}") for i in range(8)] == [i == 3 for i in range(8)]


def test_the_first_step_shown_is_one_in_which_the_student_writes(
    page: Page, finished: Workspace, tools: Tools
) -> None:
    tools["write_samples"](finished.root, [tools["step_sample"](0, []), tools["step_sample"](9)])
    page.open(write_report(finished))
    assert [visible(page, f"#map-{i}") for i in range(2)] == [False, True]


def test_colours_follow_acceptance(page: Page, report: Path) -> None:
    page.open(report)
    expression = (
        "[...document.querySelectorAll('#map-1 p.tokens > .t')].map(t => getComputedStyle(t).backgroundColor)"
    )
    colors = page.value(expression)
    assert colors[0] == "rgba(0, 0, 0, 0)", "nobody accepts or rejects guidance"
    assert len(set(colors[2:8])) == 6, "every P_trust has its colour"


def test_runs_are_shown_and_hidden(page: Page, report: Path) -> None:
    page.open(report)
    belongings = [
        "tr.run-{}",
        "#runs-loss-line-run-{}",
        "#runs-outcome-sampled-run-{}",
        "#runs-outcome-name-run-{}",
    ]

    def shown(run: int) -> set[bool]:
        return {visible(page, selector.format(run)) for selector in belongings}

    assert shown(0) == shown(1) == {True}
    page.click("#show-run-0")
    assert (shown(0), shown(1)) == ({False}, {True})
    assert visible(page, "#show-run-0")
    page.click("#show-run-0")
    page.click("#show-run-1")
    assert (shown(0), shown(1)) == ({True}, {False})


def test_what_a_model_writes_does_nothing(page: Page, finished: Workspace, tools: Tools) -> None:
    hostile = tools["step_sample"](0, [HOSTILE, '"><script>window.got = 1</script>', HOSTILE]).model_dump()
    hostile["responses"][0].update(prompt=HOSTILE, prompt_id=HOSTILE, guidance=[HOSTILE])
    tools["write_samples"](finished.root, [StepSample.model_validate(hostile)])
    page.open(write_report(finished))
    page.hover(OUTLIER)
    assert "<script>alert(1)</script>" in (box_text(page) or "")
    assert page.value("window.got") is None
    assert page.value("document.querySelectorAll('script, img').length") == 1
    assert page.console == []


def test_without_scripts_the_titles_remain(page: Page, report: Path) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.call("Page.navigate", url="about:blank")
        page.open(report)
        assert page.value(f"document.querySelector('{BOX}')") is None
        assert "P_trust\t0" in page.value(f"document.querySelector('{OUTLIER}').title")
        page.click("#map-step-3 + span")
        assert visible(page, "#map-3")
        page.click("#show-run-0")
        assert not visible(page, "tr.run-0")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
