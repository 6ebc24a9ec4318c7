"""Every path, module, link, option, setting, target, variable and message that docs and recipes name exists."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from tropd.cli.main import app
from tropd.pipeline.config.schema import Config

sys.path.insert(0, str(Path(__file__).parent))

from test_docs import ROOT

RECIPES = sorted((ROOT / "pipeline").rglob("*.toml"))
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILES = [*PAGES, NOTEBOOK, ROOT / "Makefile", *RECIPES]
SOURCES = [p.read_text() for top in ("cli", "pipeline", "storage") for p in (ROOT / top).rglob("*.py")]
# Options of other programs that the docs start.
FOREIGN = {"--max-logprobs", "--max-model-len", "--signal"} | {"--seconds", "--no-kills", "--into"}
# Written with a dot, but no settings: ids that manifests record, and attributes of a run in Python.
NOT_SETTINGS = {
    "reward.function_source",
    "reward.log",
    "student.stop_ids",
    "teacher.stop_ids",
    "run.run",
    "run.metrics",
    "run.student_path",
}
# A key of the wire's schema.
NOT_MODULES = {"tropd.options"}
EXTENSIONS = ("md", "py", "json", "jsonl", "toml", "zarr", "ipynb", "parquet", "load_from_disk")


def text_of(path: Path) -> str:
    """What a reader sees: of a recipe its comments, of a notebook its cells."""
    text = path.read_text()
    if path.suffix == ".toml":
        return "\n".join(re.findall(r"#.*", text))
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def code_of(page: Path) -> list[str]:
    """Code of a page: each indented line, and each inline span."""
    text = text_of(page)
    if page.suffix != ".md":
        return text.splitlines()
    return [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models in a field's type, whatever unions, lists and annotations are around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models(inner)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields below a configuration's section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in models(field.annotation):
            yield from settings(inner, f"{prefix}{name}.")


SETTINGS = set(settings(Config))
SECTIONS = set(Config.model_fields)


def options(command: Any) -> set[str]:
    found = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return found.union(*(options(inner) for inner in getattr(command, "commands", {}).values())) | {"--help"}


OPTIONS = options(get_command(app))


def top_names(source: Path) -> set[str]:
    """What a module defines or imports, without importing it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case (
                ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name))
            ):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name for alias in names}
    return found


def defined(dotted: str) -> bool:
    """Whether a module, or a name in one, exists. Importing it would take PyTorch's seconds."""
    words = dotted.split(".")[1:]
    for i in range(len(words), -1, -1):
        module = ROOT.joinpath(*words[:i])
        source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if source.exists():
            return i == len(words) or words[i] in top_names(source)
    return False


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", FILES, ids=name)
def test_paths_exist(page: Path) -> None:
    for path in re.findall(r"(?<![\w/.-])(?:pipeline|storage|cli|tests|docs)/[\w/.*-]*\w/?", text_of(page)):
        if "*" in path:
            assert list(ROOT.glob(path)), f"{name(page)} names {path}"
        else:
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


@pytest.mark.parametrize("page", FILES, ids=name)
def test_modules_and_their_names_exist(page: Path) -> None:
    text = text_of(page)
    found = set(re.findall(r"\btropd(?:\.[a-zA-Z_]\w*)+", text)) - NOT_MODULES
    for module, names in re.findall(r"from (tropd[\w.]*) import ([\w, ]+)", text):
        found |= {f"{module}.{each.strip()}" for each in names.split(",")}
    for dotted in found:
        assert defined(dotted), f"{name(page)} names {dotted}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_pages_and_headings_that_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    pages = {name(page) for page in [*PAGES, NOTEBOOK] if page.parent.name == "docs"}
    assert pages <= linked


@pytest.mark.parametrize("page", FILES, ids=name)
def test_options_exist(page: Path) -> None:
    known = OPTIONS | FOREIGN
    for code in code_of(page):
        if page.suffix == ".md" and not code.startswith("--"):
            continue  # of a command: tests/cli/test_docs.py
        if page.name == "Makefile" and "tropd " not in code:
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert option in known, f"{name(page)}: {option}"


@pytest.mark.parametrize("page", FILES, ids=name)
def test_settings_exist(page: Path) -> None:
    for code in code_of(page):
        for section, rest in re.findall(r"(?<![\w./*-])([a-z]+)\.([a-z_]+(?:\.[a-z_]+)*)(?![\w(*])", code):
            dotted = f"{section}.{rest}"
            if section not in SECTIONS or dotted in NOT_SETTINGS or rest.split(".")[-1] in EXTENSIONS:
                continue
            assert dotted in SETTINGS, f"{name(page)}: there is no setting {dotted}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_in_examples_exist(page: Path) -> None:
    def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in table.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict) and f"{prefix}{key}" not in OPEN:
                    yield from leaves(each, f"{prefix}{key}.")
            yield prefix + key

    OPEN = {  # any key
        "data.sources.fields",
        "data.sources.where",
        "evaluation.harness.generation",
        "student.chat_template_args",
        "teacher.chat_template_args",
    }
    for block in re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE):
        try:
            table = tomllib.loads(re.sub(r"^    ", "", block, flags=re.MULTILINE))
        except tomllib.TOMLDecodeError:
            continue
        if not set(table) <= SECTIONS:
            continue  # an objective, or output
        for dotted in leaves(table):
            assert dotted in SETTINGS, f"{page.name}: there is no setting {dotted}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for code in code_of(page):
        for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code):
            pattern = re.sub(r"table\d$", "%", target)
            assert re.search(rf"^{re.escape(pattern)}:", makefile, re.MULTILINE), (
                f"{page.name}: make {target}"
            )


@pytest.mark.parametrize("page", FILES, ids=name)
def test_variables_of_the_environment_exist(page: Path) -> None:
    known = [*SOURCES, (ROOT / "tests" / "conftest.py").read_text(), (ROOT / "Makefile").read_text()]
    for variable in re.findall(r"\bTROPD_\w+", text_of(page)):
        assert any(variable in source for source in known), f"{name(page)} names {variable}"


def test_makefile_targets_are_phony_and_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"[\w-]+", makefile.split(".PHONY:")[1].split("\n")[0]))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", makefile, re.MULTILINE))
    assert phony == targets
    undescribed = [t for t in targets if not re.search(rf"^{t}:.*## [A-Z]", makefile, re.MULTILINE)]
    assert undescribed in ([], ["browser"])


def texts(code: str) -> Iterator[str]:
    """The texts of a module; values in them are ``…``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_that_are_explained_exist() -> None:
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("## Messages")[1]
    code = "\n".join(text.replace("\n", " ") for source in SOURCES for text in texts(source))
    quoted = [
        text
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for text in re.findall(r'"([^"]+)"', cell)
    ]
    assert len(quoted) > 20
    for message in quoted:
        pattern = ".*".join(re.escape(piece.strip()) for piece in re.split(r"…|\d+", message))
        assert re.search(pattern, code), f"no error says {message!r}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_figures_of_the_readme_stand_in_the_comparison() -> None:
    comparison = (ROOT / "docs" / "comparison.md").read_text()
    figures = re.findall(r"\d+\.\d \[[\d., -]+\]", (ROOT / "README.md").read_text())
    assert len(figures) > 5
    assert [figure for figure in figures if figure not in comparison] == []
