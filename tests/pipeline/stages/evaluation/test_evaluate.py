"""Evaluations of several benchmarks: what is asked of the models, resumption by batches, and wrong settings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_runs import make_run

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.run import opening
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.shards import Execution, Part
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError, DataError, FingerprintMismatchError
from tropd.storage.stage.stage import Stage

EXTRA = """
[evaluation]
batch_size = 8
samples = 2
pass_at = [1, 2]
[[evaluation.benchmarks]]
name = "boxed"
problems = "data/boxed.jsonl"
grader = "math"
samples = 4
pass_at = [1, 4]
limit = 3
prompt_field = "question"
template = "1+{prompt}"
"""


@pytest.fixture
def run(tmp_path: Path, tiny_models: Path) -> Run:
    made = make_run(tmp_path / "run", tiny_models, extra=EXTRA)
    lines = [json.dumps({"id": n, "question": f"{n}=", "answer": f"\\boxed{{{n + 1}}}"}) for n in range(5)]
    (made.workspace.root / "data" / "boxed.jsonl").write_text("\n".join(lines) + "\n")
    return made


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_each_set_of_problems_has_its_own_settings(run: Run) -> None:
    summary = evaluate(run, whom=("before",)).summary
    folder = run.workspace.stage("eval")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet")) == [
        "boxed/part-before.parquet",
        "distance-before.parquet",
        "part-before.parquet",
        "responses-before.parquet",
        "responses-teacher.parquet",
    ]
    own, boxed = rows(folder / "part-before.parquet"), rows(folder / "boxed" / "part-before.parquet")
    assert [(r["mode"], r["prompt_id"], r["sample_index"]) for r in own[:11]] == [
        *(("greedy", f"p{n}", 0) for n in range(10)),
        ("sampled", "p0", 0),
    ]
    assert len(own) == 10 + 2 * 10
    assert [(r["prompt_id"], r["sample_index"]) for r in boxed] == [
        (str(n), i) for n in range(3) for i in range(4)
    ]
    assert {r["mode"] for r in boxed} == {"sampled"}
    sampled = summary["sampled"]
    assert (sampled["eval"]["before"]["samples"], sampled["boxed"]["before"]["problems"]) == (2, 3)
    assert set(sampled["boxed"]["before"]["pass_at"]) == {"1", "4"}
    share = sum(r["correct"] for r in boxed) / len(boxed)
    assert sampled["boxed"]["before"]["average"]["value"] == pytest.approx(share)
    assert summary["accuracy"]["before"]["greedy"] == sum(r["correct"] for r in own[:10]) / 10


@pytest.mark.parametrize("survived", range(1, 9))
def test_a_killed_evaluation_loses_one_batch_and_ends_the_same(
    run: Run, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    undisturbed = make_run(tmp_path / "undisturbed", tiny_models, extra=EXTRA)
    (undisturbed.workspace.root / "data" / "boxed.jsonl").write_bytes(
        (run.workspace.root / "data" / "boxed.jsonl").read_bytes()
    )
    evaluate(undisturbed, whom=("before",))
    original, commits = Stage.commit, []

    def commit(self: Stage, name: str, rows: int) -> None:
        if len(commits) == survived:
            raise KeyboardInterrupt
        commits.append(name)
        original(self, name, rows)

    monkeypatch.setattr(Stage, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, whom=("before",))
    monkeypatch.setattr(
        Stage, "commit", lambda self, name, rows: (commits.append(name), original(self, name, rows))
    )
    evaluate(run, whom=("before",))
    assert len(set(commits)) == len(commits)  # no batch was answered twice
    assert content_digest(run.workspace.stage("eval")) == content_digest(undisturbed.workspace.stage("eval"))


def test_parts_make_the_responses_and_the_stage_gathers_them(
    run: Run, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_run(tmp_path / "undisturbed", tiny_models, extra=EXTRA)
    (undisturbed.workspace.root / "data" / "boxed.jsonl").write_bytes(
        (run.workspace.root / "data" / "boxed.jsonl").read_bytes()
    )
    whole = evaluate(undisturbed, whom=("before",))
    parts = [evaluate(run, whom=("before",), execution=Execution(Part(index, 3))) for index in (3, 1, 2)]
    assert not any(part.complete for part in parts)
    made = [set(part.shards) for part in parts]
    assert all(made)
    assert sum(map(len, made)) == len(set.union(*made))  # each by one of them

    def unwanted(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a piece is made again")

    monkeypatch.setattr("tropd.pipeline.stages.evaluation.evaluate.make_piece", unwanted)
    gathered = evaluate(run, whom=("before",))
    assert gathered.complete
    assert gathered.summary["sampled"] == whole.summary["sampled"]
    for name in ("part-before.parquet", "boxed/part-before.parquet"):
        assert rows(run.workspace.stage("eval") / name) == rows(undisturbed.workspace.stage("eval") / name)
    assert not (run.workspace.root / "eval.parts").exists()


def test_wrong_settings_are_refused_before_any_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_model", None)
    text = run.workspace.config_path.read_text()
    for old, new, words in (
        ("pass_at = [1, 4]", "pass_at = [5]", "pass@5 needs samples = 5"),
        ('template = "1+{prompt}"', 'template = "1+"', r"has \{prompt\} in it exactly once"),
        ('grader = "math"', 'grader = "maths"', "grader"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config(text.replace(old, new), where="config.toml")
    again = text + '[[evaluation.benchmarks]]\nname = "boxed"\nproblems = "x"\n'
    with pytest.raises(ConfigError, match="names are not unique"):
        parse_config(again, where="config.toml")
    (run.workspace.root / "data" / "boxed.jsonl").unlink()
    with pytest.raises(DataError, match=r"benchmark 'boxed': .* does not exist"):
        evaluate(run, whom=("before",))
    other = text.replace('prompt_field = "question"', "")
    (run.workspace.root / "data" / "boxed.jsonl").write_text('{"question": "1=", "answer": "2"}\n')
    with pytest.raises(DataError, match="no field 'prompt'"):
        evaluate(replace(run, resolved=parse_config(other, where="config.toml")), whom=("before",))


def test_a_grader_that_finds_nothing_in_any_response_is_told(run: Run) -> None:
    warnings: list[str] = []

    class Told(type(SILENT)):  # type: ignore[misc]
        def warning(self, message: str) -> None:
            warnings.append(message)

    never = {"grader": "pattern", "answer_pattern": "(never)", "benchmarks": ()}
    settings = run.config.evaluation.model_copy(update=never)
    config = run.config.model_copy(update={"evaluation": settings})
    run = replace(run, resolved=replace(run.resolved, config=config), reporter=Told())
    evaluate(run, whom=("before", "teacher"))
    assert warnings == [next(w for w in warnings if "no response of before, teacher has an answer" in w)]
    assert "evaluation.answer_pattern" in warnings[0]


def test_marks_of_other_rules_are_not_done_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(run, whom=("before",))
    monkeypatch.setattr("tropd.pipeline.stages.evaluation.evaluate.RULES", 0)
    with pytest.raises(FingerprintMismatchError, match=r"evaluation\.grading_rules: \d → 0"):
        evaluate(run, whom=("before",))
