"""Settings that are decided when a run is opened: precision, threads, and the grader of older workspaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run import automatic
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import Manifest, write_manifest


def opened(run: Run, text: str = "", **recorded: dict[str, Scalar]) -> Run:
    """The run with only this configuration, in a workspace whose stages have recorded these fields."""
    for name, fields in recorded.items():
        folder = run.workspace.stage(name)
        folder.mkdir()
        (folder / "part-00000.parquet").write_bytes(b"rows")
        write_manifest(folder, Manifest.start(name, Fingerprint(fields)))
    return replace(run, resolved=parse_config(f'[objective]\nname = "tropd"\n{text}'))


def dtypes(run: Run) -> tuple[str, str]:
    return run.config.teacher.settled_dtype, run.config.student.settled_dtype


def test_precision_is_what_the_device_is_good_at(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dtypes(opened(tiny_run)) == ("float32", "float32")
    assert dtypes(opened(tiny_run, "[runtime]\ndevice = 'cuda'")) == ("bfloat16", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dtypes(opened(tiny_run)) == ("bfloat16", "bfloat16")
    assert dtypes(opened(tiny_run, "[runtime]\ndevice = 'cpu'")) == ("float32", "float32")
    assert dtypes(opened(tiny_run, "[teacher]\ndtype = 'float32'")) == ("float32", "bfloat16")


def test_a_workspace_keeps_the_precision_that_it_was_begun_with(tiny_run: Run) -> None:
    run = opened(
        tiny_run, prefixes={"teacher.dtype": "bfloat16"}, eval={"before.student.dtype": "bfloat16", "a": 1}
    )
    assert dtypes(run) == ("bfloat16", "bfloat16")
    assert dtypes(opened(run, "[student]\ndtype = 'float32'")) == ("bfloat16", "float32")
    (run.workspace.stage("eval") / "part-00000.parquet").unlink()  # a stage that holds nothing says nothing
    assert dtypes(opened(run)) == ("bfloat16", "float32")
    (run.workspace.stage("prefixes") / "manifest.json").write_text("{")  # the stage itself will refuse it
    assert dtypes(opened(run)) == ("float32", "float32")


def test_teachers_of_domains_have_a_precision_each(tiny_run: Run) -> None:
    one = "[[teacher.by_domain]]\ndomain = '{}'\nmodel = 'm'\n"
    run = opened(tiny_run, one.format("math") + one.format("code"), scores={"teacher.math.dtype": "bfloat16"})
    assert [own.settled_dtype for own in run.config.teacher.by_domain] == ["bfloat16", "float32"]
    assert run.config.teacher.settled_dtype == "float32"


def test_precision_that_is_not_decided_is_no_value() -> None:
    with pytest.raises(ValueError, match="not decided yet"):
        _ = parse_config('[objective]\nname = "tropd"').config.student.settled_dtype


def test_the_grader_of_an_older_workspace_stays(tiny_run: Run) -> None:
    assert opened(tiny_run).config.evaluation.grader == "math"
    run = opened(tiny_run, eval={"evaluation.grader": "pattern"})
    assert run.config.evaluation.grader == "pattern"
    assert opened(run, "[evaluation]\ngrader = 'math'").config.evaluation.grader == "math"


def test_threads_follow_the_size_of_the_models(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_models)
    assert run.config.runtime.threads == 1
    assert opened(run, "[demo]\nenabled = true").config.runtime.threads == 1  # its models are made later
    assert opened(run, "[student]\nmodel = 'someone/on-the-hub'").config.runtime.threads == 0
    assert opened(run, "[runtime]\nthreads = 3").config.runtime.threads == 3
    monkeypatch.setattr(automatic, "TINY_BYTES", 1000)
    assert replace(run).config.runtime.threads == 0


def test_results_of_automatic_settings_are_those_of_the_same_values(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    run = make_run(tmp_path / "run", models)
    made = generate_prefixes(run)
    text = run.workspace.config_path.read_text()
    left = parse_config(text.replace('dtype = "float32"\n', ""))
    assert left.config.teacher.dtype == "auto"
    assert generate_prefixes(replace(run, resolved=left)).fingerprint == made.fingerprint
