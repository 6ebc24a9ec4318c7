"""Every cell of the packaged tables has a configuration that can be trained with."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_runs import make_run

from tropd.pipeline.config.paper_tables import load_table, table_names
from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments import compare as compare_module
from tropd.pipeline.experiments.compare import cell_config
from tropd.pipeline.run.cells import Cell
from tropd.pipeline.run.processes.child_environment import become_child
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace


@pytest.mark.parametrize("name", table_names())
def test_no_cell_of_a_table_is_refused(name: str, tmp_path: Path) -> None:
    for setting in load_table(name, rehearse=False).settings:
        run = Run(Workspace.create(tmp_path), parse_config(recipe_text(setting.recipe)), SILENT)
        assert (run.config.teacher.engine, run.config.teacher.scorer) == ("vllm", "transformers")
        for row in setting.rows:
            config = cell_config(run, Cell(row.objective, 0))
            assert (config.teacher.engine, config.teacher.scorer) == ("vllm", "transformers")


def test_a_run_of_a_comparison_has_all_gpus(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_models)
    used: list[tuple[str, int]] = []

    def no_service(*arguments: Any, **options: Any) -> None:
        raise AssertionError("each process starts a teacher of its own")

    stubs: dict[str, Any] = {
        "finished": lambda *_: None,
        "check_engines": lambda *_: [],
        "LocalTeacher": no_service,
        "train_on": lambda cell, gpus: used.append((cell.workspace.root.parent.name, gpus)),
        "evaluate": lambda cell, whom, execution: used.append((whom[0], execution.gpus)),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(compare_module, name, stub)
    compare_module.compare(run, ["opd", "sft"], 1, gpus=8)
    assert used == [("before", 8), ("opd", 8), ("after", 8), ("sft", 8), ("after", 8)]


def test_every_row_has_room_before_the_first_begins(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_models)

    def no_room(cell: Run, gpus: int, longest: int) -> None:
        if cell.config.objective.name == "eopd":
            raise ConfigError(f"eopd does not fit on {gpus} GPUs")

    stubs: dict[str, Any] = {
        "finished": lambda *_: None,
        "require_room": no_room,
        "train_on": lambda *_: pytest.fail("trained"),
        "evaluate": lambda *_, **__: pytest.fail("evaluated"),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(compare_module, name, stub)
    with pytest.raises(ConfigError, match="eopd does not fit on 8 GPUs"):
        compare_module.compare(run, ["opd", "eopd"], 1, gpus=8)


def test_workers_of_a_comparison_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,6")
    waiting, before, seen = [0, 2], dict(os.environ), []
    try:
        while waiting:
            os.environ.update(before)  # as a worker inherits it
            compare_module.use_one_gpu(SimpleNamespace(get=lambda: waiting.pop(0)))
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    finally:
        become_child(before)
    assert seen == ["3", "6"]


def test_an_objective_that_needs_entropies_is_scored_outside_of_vllm(tiny_run: Run) -> None:
    in_vllm = tiny_run.config.teacher.model_copy(update={"engine": "vllm", "scoring_engine": None})
    config = tiny_run.config.model_copy(update={"teacher": in_vllm})
    run = replace(tiny_run, resolved=replace(tiny_run.resolved, config=config))
    scorers = {name: cell_config(run, Cell(name, 0)).teacher.scorer for name in ("opd", "eopd")}
    assert scorers == {"opd": "vllm", "eopd": "transformers"}
