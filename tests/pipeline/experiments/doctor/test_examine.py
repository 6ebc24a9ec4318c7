"""A student that is its own teacher: all parts agree, and one that is broken is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropd.pipeline.models.engines import proof

sys.path.insert(0, str(Path(__file__).parents[2] / "teacher"))

from running import running

from tropd.cli import main as cli
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.doctor import examine as doctor
from tropd.pipeline.models.engines.lean.lean_decoder import LeanDecoder
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.service.app import create_app
from tropd.pipeline.teacher.service.serve import load_service
from tropd.pipeline.training.update.student import StudentPass


@contextmanager
def served(run: Run, *assignments: str) -> Iterator[Run]:
    """The run with its teacher at a service, as ``--set`` would have it."""
    config = run.workspace.config_path.read_text()
    here = Run(run.workspace, parse_config(config, list(assignments), where="config.toml"), SILENT)
    engine, info = load_service(here)
    with running(create_app(engine, info, here.config.service, None)) as url:
        given = (*assignments, f"teacher.url={json.dumps(url)}")
        yield Run(run.workspace, parse_config(config, list(given), where="config.toml"), SILENT, given)


@pytest.fixture
def service(tiny_run: Run) -> Iterator[Run]:
    with served(tiny_run) as run:
        yield run


def by_names(found: doctor.Examination) -> dict[tuple[str, str], Any]:
    def short(name: str) -> str:
        return next(w for w in ("sampler", "training", "plain", "weights", "service", "process") if w in name)

    return {(short(d.one), short(d.other)): d for d in found.differences}


def test_with_the_student_as_teacher_all_parts_agree(service: Run) -> None:
    found = doctor.examine(service, prompts=4, tokens=8)
    assert (found.prompts, found.advice) == (4, [])
    assert set(by_names(found)) == {
        ("training", "sampler"),
        ("training", "plain"),
        ("sampler", "plain"),
        ("weights", "sampler"),
        ("service", "process"),
    }
    assert max(d.largest or 0.0 for d in found.differences) < 2e-5
    assert found.outliers.rejected < 1e-5
    assert (found.outliers.share, found.outliers.with_teacher) == (0.0, 0.0)
    assert "0.00%" in found.meaning


def test_in_bfloat16_they_differ_by_rounding(tiny_run: Run) -> None:
    with served(tiny_run, 'student.dtype="bfloat16"', 'teacher.dtype="bfloat16"') as run:
        found = doctor.examine(run, prompts=4, tokens=8)
    differences = by_names(found)
    assert differences["training", "plain"].mean > 1e-4  # it is not float32 that is measured
    assert found.advice == []
    assert found.outliers.rejected < 0.02


def test_a_sampler_with_other_logprobs_is_named(service: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LeanDecoder.step

    def off(self: LeanDecoder, draws: Any) -> Any:
        tokens, logprobs, drawn = step(self, draws)
        return tokens, logprobs - 0.01, drawn

    monkeypatch.setattr(proof, "check_decoding", lambda *arguments: None)
    monkeypatch.setattr(LeanDecoder, "step", off)
    found = doctor.examine(service, prompts=4, tokens=8)
    assert len(found.advice) == 3
    assert all("the sampler" in line for line in found.advice)


def test_a_training_pass_that_differs_is_named(service: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StudentPass.forward

    def off(self: StudentPass, *arguments: Any) -> Any:
        targets, *others = forward(self, *arguments)
        return targets * 1.01, *others

    monkeypatch.setattr(StudentPass, "forward", off)
    found = doctor.examine(service, prompts=4, tokens=8)
    assert [line.split(" differ")[0] for line in found.advice] == [
        "the training pass and the sampler (transformers)",
        "the training pass and a plain pass in float32",
    ]


def test_a_service_with_other_answers_is_named(service: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*arguments: Any, **options: Any) -> Any:
        data = ask(*arguments, **options)
        moved = data.teacher_logprobs + np.float32(0.5)
        return type(data)(moved, data.entropy, data.topk)

    ask = doctor.ask_teacher
    monkeypatch.setattr(doctor, "ask_teacher", off)
    [line] = doctor.examine(service, prompts=4, tokens=8).advice
    assert line.startswith("the teacher's service and the teacher in this process differ")


def test_the_command_line_prints_a_table_or_json_and_fails_where_something_is_off(
    service: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tropd(*options: str) -> tuple[int, str]:
        overrides = [part for one in service.assignments for part in ("--set", one)]
        command = ["tropd", "doctor", "-w", str(service.workspace.root), "--prompts", "3", *overrides]
        monkeypatch.setattr(sys, "argv", [*command, "--tokens", "6", *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, text = tropd()
    assert code == 0
    assert "the sampler (transformers)" in text
    assert text.rstrip().endswith("rounding explains every difference")
    code, text = tropd("--json")
    found = json.loads(text)
    assert (code, found["sound"], found["prompts"]) == (0, True, 3)
    assert {"one", "other", "mean", "p99", "largest", "sound"} <= set(found["differences"][0])
    assert found["outliers"]["share"] == 0.0
    monkeypatch.setattr(
        "tropd.pipeline.experiments.doctor.differences.MEAN_LIMITS", dict.fromkeys(doctor.DTYPES.values(), -1)
    )
    code, text = tropd("--json")
    assert (code, json.loads(text)["sound"]) == (1, False)
