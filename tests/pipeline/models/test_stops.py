"""A student is stopped where its teacher stops, it is exported so, and another end is another stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_models, make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.demo.tokenizer import vocabulary
from tropd.pipeline.models.stops import stop_ids
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_prefixes, generate_rollouts
from tropd.pipeline.teacher.connect import check_stops
from tropd.pipeline.teacher.wire.info import ServiceInfo
from tropd.pipeline.training.loop import train
from tropd.storage.errors import ConfigError, FingerprintMismatchError
from tropd.storage.formats.trajectories import read_trajectories

OWN, OTHER = 1, 5
TEXTS = list(vocabulary())
EXTRA = """
[train]
steps = 1
[evaluation]
limit = 3
"""


def ending(folder: Path, *ids: int) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ids)}))
    return folder


def run_of(folder: Path, models: Path, teacher: Path, extra: str = "") -> Run:
    """A run of two models, with the objective that trains on the teacher's trajectories."""
    run = make_run(folder, models, prompts=6, extra=EXTRA)
    text = run.workspace.config_path.read_text().replace('"tropd"', '"sft"')
    text = text.replace(
        f"[teacher]\nmodel = {json.dumps(str(models))}", f"[teacher]\nmodel = {json.dumps(str(teacher))}"
    )
    text = text.replace("[rollout]", f"[rollout]\nprompts_per_step = 4\nsamples_per_prompt = 1\n{extra}")
    run.workspace.config_path.write_text(text)
    return replace(run, resolved=parse_config(text))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return ending(make_models(tmp_path / "student"), OWN), ending(make_models(tmp_path / "teacher", 1), OTHER)


class Said:
    """A reporter that keeps its warnings."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def last_tokens(run: Run, stage: str) -> set[int]:
    folder = run.workspace.stage(stage)
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in read_trajectories(path)]
    assert all(not {OWN, OTHER} & set(row.tokens[:-1]) for row in rows if row.author == "student")
    stopped = [row for row in rows if row.finish_reason == "stop"]
    # OTHER is a digit to the tokenizer; as the end of a response it is no text.
    assert all(row.text == "".join(TEXTS[t] for t in row.tokens[:-1] if t > OWN) for row in stopped)
    return {row.tokens[-1] for row in stopped}


def test_the_student_stops_where_the_teacher_does_and_is_exported_so(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    run = run_of(tmp_path / "run", *pair)
    said = Said(run.reporter)
    run = replace(run, reporter=said)
    generate_prefixes(run)
    generate_rollouts(run)
    assert last_tokens(run, "prefixes") == {OWN, OTHER}  # the tokenizer of both has OWN
    assert last_tokens(run, "rollouts") == {OWN, OTHER}
    words = "the teacher ends a response with '<eos>' (1), '3' (5), the student with '<eos>' (1)"
    assert words in said.warnings[0]
    assert "rollout.stop_ids, now [1, 5]" in said.warnings[0]
    assert train(run).fields["student.stop_ids"] == "[1, 5]"
    written = json.loads((run.workspace.stage("train") / "final" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [OWN, OTHER]
    fields = evaluate(run).fields
    ends = {name: value for name, value in fields.items() if name.endswith("stop_ids")}
    assert ends == {
        f"{who}.stop_ids": "[1, 5]" for who in ("before.student", "after.student", "teacher.teacher")
    }


def test_other_ends_are_never_done_before(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    run = run_of(tmp_path / "run", student, ending(teacher, OWN))
    generate_prefixes(run)
    train(run)
    evaluate(run, whom=("before",))
    ending(student, OWN, 9)
    with pytest.raises(FingerprintMismatchError, match=r"\n    student\.stop_ids: '\[1\]' → '\[1, 9\]' "):
        train(run)
    with pytest.raises(
        FingerprintMismatchError, match=r"\n    before\.student\.stop_ids: '\[1\]' → '\[1, 9\]' "
    ):
        evaluate(run, whom=("before",))
    generate_prefixes(run)  # the teacher's are what they were
    ending(teacher, OTHER)
    with pytest.raises(FingerprintMismatchError, match=r"\n    teacher\.stop_ids: '\[1\]' → '\[1, 5\]' "):
        generate_prefixes(run)


def test_a_setting_decides_for_both(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run = run_of(tmp_path / "run", *pair, extra="stop_ids = [7]\n")
    run = replace(run, reporter=Said(run.reporter))
    generate_prefixes(run)
    assert run.reporter.warnings == []
    assert last_tokens(run, "prefixes") == {7}
    for role in ("teacher", "student"):
        assert stop_ids(run.workspace, run.config, role) == {7}
    wrong = run_of(tmp_path / "wrong", *pair, extra="stop_ids = [1, 99]\n")
    with pytest.raises(ConfigError, match=r"rollout.stop_ids names 99, .* ids 0 … 23"):
        generate_prefixes(wrong)


def test_a_served_teacher_with_other_ends_is_refused_with_the_setting_that_helps(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    run = run_of(tmp_path / "run", pair[0], pair[0])
    info = ServiceInfo(
        model="m",
        weights="w",
        tokenizer="t",
        tokenizer_size=24,
        stop_ids=(5, 7),
        vocab_size=24,
        max_length=9,
        max_request_tokens=9,
        max_request_bytes=9,
        queue_tokens=9,
    )
    with pytest.raises(ConfigError, match=r"not stopped at \[7\]") as caught:
        check_stops(run, "http://there", info, {1, 5})
    assert caught.value.hint == "set rollout.stop_ids = [1, 5, 7]"
    check_stops(run, "http://there", info, {1, 5, 7})
    settled = run_of(tmp_path / "settled", pair[0], pair[0], extra="stop_ids = [1, 5, 7]\n")
    check_stops(settled, "http://there", info, {1, 5, 7})
