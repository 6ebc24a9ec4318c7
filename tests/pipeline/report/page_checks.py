"""Reading a page in tests: well-formed, self-contained, with its own script or none."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">&amp;{{ 7*7 }}\x00\x1b[31m\r\u202e'
VOID = {"meta", "link", "br", "hr", "img", "input"}


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


def check_script(html: str, checker: Checker) -> None:
    """The page's own script and no other; what the policy allows is this one alone."""
    own = (resources.files("tropd.pipeline.report.page") / "page.js").read_text()
    shown = '<p class="tokens"' in html
    assert checker.tags.count("script") == shown
    assert (f"<script>{own}</script>" in html) == shown
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    allowed = ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]
    assert policy.split("; ") == [*allowed, *([f"script-src 'sha256-{digest}'"] if shown else [])]


def check(page: Path) -> Checker:
    html = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids)), "ids are unique in the page"
    assert set(checker.references) <= set(checker.ids), "every reference has its target"
    check_script(html, checker)
    assert not re.search(r"https?://", html), "nothing is fetched, not even named"
    assert not re.search(r"@import|@font-face|url\((?!#)", html)
    assert not {"iframe", "object", "embed", "img"} & set(checker.tags)
    return checker


def text_of(page: Path) -> str:
    return " ".join(" ".join(check(page).text).replace("\u00a0", " ").split())
