"""The notebook of the docs runs from its first cell to its last, each cell's last expression being its result.

Without Jupyter: its cells are executed in their order in one process. What only a kernel does is not tested.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def execute(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.slow
@pytest.mark.slowest
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    results = [execute(cell, names) for cell in cells]
    assert str(results[2]).startswith("Distillation(")
    assert results[3] == (8, results[3][1])
    assert [row["step"] for row in results[4]] == list(range(8))
    assert set(results[5]) == {"before", "after", "teacher"}
    assert results[6].is_file()
    assert results[7].startswith("6+4*7-4=")
    # Run once more, everything is there already.
    assert execute(cells[3], names)[0] == 8
    assert all(not cell.get("outputs") for cell in notebook["cells"])
