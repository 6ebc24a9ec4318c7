"""The page of a comparison."""

from __future__ import annotations

from html.parser import HTMLParser

from tropd.pipeline.report.comparison.comparison import CURVES, Comparison, MethodResult, ReportedEstimate
from tropd.pipeline.report.comparison.comparison_page import render_comparison


def method(name: str, **difference: ReportedEstimate) -> MethodResult:
    estimate = ReportedEstimate(mean=0.5, low=0.4, high=0.6)
    return MethodResult(
        objective=name,
        seeds=[0, 1],
        accuracy={"greedy": estimate, "sampled": estimate},
        per_seed={"greedy": [0.4, 0.6], "sampled": [0.4, 0.6]},
        difference=difference,
        steps=3,
        tokens_on_policy=10.0,
        teacher_tokens_scored=10.0,
        teacher_topk_tokens=2.0,
        teacher_bytes_received=100.0,
        seconds=1.0,
        curves={curve: [0.1, None, 0.3] for curve in CURVES},
    )


def test_the_page_is_whole_and_escapes_names() -> None:
    gain = ReportedEstimate(mean=0.1, low=-0.1, high=0.3)
    found = Comparison(
        workspace="<script>alert(1)</script>",
        baseline="opd",
        problems=20,
        before={"greedy": 0.1, "sampled": 0.1},
        teacher={"greedy": 1.0, "sampled": 0.9},
        methods=[method("opd"), method("tropd", greedy=gain, sampled=gain)],
    )
    html = render_comparison(found)
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "link", "br", "path", "use", "rect"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "use", "rect"):
                assert open_tags.pop() == tag

    Checker().feed(html)
    assert open_tags == []
    assert "+10.0" in html
    assert html.count("<svg") == 1 + len(CURVES)
