"""No two public types, and no two public functions below the commands, have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Names that say the place of a module in a protocol: of each stage, of each group of commands.
SHARED = {"fingerprint", "register", "logger"}


def _public_names(source: str) -> list[str]:
    """Types, type aliases (capitalized) and functions of a module."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_") and not name.isupper() and name not in SHARED]


def test_a_type_or_function_has_a_name_of_its_own() -> None:
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for folder in ("pipeline", "storage"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in _public_names(path.read_text()):
                homes[name].append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice, "rename one of each"


def test_the_check_sees_a_second_home() -> None:
    assert _public_names("class Aa: ...\ndef b(): ...\nCc = int\n_d = 1\nEE = 2") == ["Aa", "b", "Cc"]
