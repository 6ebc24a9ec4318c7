"""Commands and options that README and docs tell people to type exist; hints can be typed as they stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tropd.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(page: Path) -> list[str]:
    """Every ``tropd …`` of a page: of indented blocks (with continuations) and of inline code."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [line.split("#")[0] for line in text.splitlines() if line.startswith("    ")]
    spans = re.findall(r"`([^`\n]+)`", text)
    found = [re.search(r"(?:^|[\s/])tropd ([a-z][^|&;<>]*)", part) for part in [*blocks, *spans]]
    return [match[1].strip() for match in found if match]


def resolve(words: list[str]) -> tuple[Any, str]:
    command, path = get_command(app), "tropd"
    for word in words:
        if not hasattr(command, "commands") or not word.islower() or word.startswith("-"):
            break
        path = f"{path} {word}"
        assert word in command.commands, f"{path}: there is no such command"
        command = command.commands[word]
    return command, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_docs_exist(page: Path) -> None:
    for line in command_lines(page):
        words = line.split()
        command, path = resolve([word.strip("[],.:") for word in words])
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line):
            assert option in known, f"{page.name}: {path} has no option {option}"


def test_no_message_has_a_placeholder_for_a_command_to_be_typed() -> None:
    for path in [p for folder in ("cli", "pipeline", "storage") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.search(r"tropd [a-z-]+ .*\b(WORKSPACE|DIR|W)\b", node.value)
                assert found is None, f"{path.relative_to(ROOT)}:{node.lineno}: {found and found.group()}"
