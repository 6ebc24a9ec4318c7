"""Every cell of the packaged tables has a configuration that can be trained with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd.pipeline.config.paper_tables import load_table, table_names
from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.compare import cell_config
from tropd.pipeline.run.cells import Cell
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.workspace import Workspace


@pytest.mark.parametrize("name", table_names())
def test_no_cell_of_a_table_is_refused(name: str, tmp_path: Path) -> None:
    for setting in load_table(name, rehearse=False).settings:
        run = Run(Workspace.create(tmp_path), parse_config(recipe_text(setting.recipe)), SILENT)
        assert (run.config.teacher.engine, run.config.teacher.scorer) == ("vllm", "transformers")
        for row in setting.rows:
            config = cell_config(run, Cell(row.objective, 0))
            assert (config.teacher.engine, config.teacher.scorer) == ("vllm", "transformers")
