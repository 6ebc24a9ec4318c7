"""Making a table: every stage of it has all GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.paper_tables import load_table
from tropd.pipeline.experiments import reproduce as reproduce_module
from tropd.pipeline.experiments.reproduce import Job, ResultBlock, reproduce
from tropd.pipeline.run.progress import SILENT


def test_every_stage_of_a_table_has_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []

    def stage(name: str) -> Any:
        def note(*_: Any, execution: Any = None, gpus: int = 0, **__: Any) -> None:
            used.append((name, gpus if execution is None else execution.gpus))

        return note

    for name in ("generate_prefixes", "score_teacher", "sft", "compare"):
        monkeypatch.setattr(reproduce_module, name, stage(name))
    for name in ("prepare", "fetch_sources", "fetch_questions", "check_judges"):
        monkeypatch.setattr(reproduce_module, name, lambda *_: None)
    nothing = ResultBlock(title="", benchmarks=[], rows=[])
    monkeypatch.setattr(reproduce_module, "made_block", lambda *_: nothing)
    table = load_table("table3", rehearse=False)
    reproduce(Job(tmp_path, "table3", table, False, 1, 1, (), gpus=8), SILENT)
    assert {name for name, _ in used} >= {"generate_prefixes", "score_teacher", "compare"}
    assert {gpus for _, gpus in used} == {8}
