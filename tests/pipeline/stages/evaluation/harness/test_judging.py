"""Benchmarks that lighteval judges: with the driver itself and a stand-in for lighteval."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

from lighteval_stand_in import make_environment
from tiny_runs import make_models, make_run

from tropd.pipeline.config.paper_tables import PaperTable, Setting, load_table
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments import reproduce as making
from tropd.pipeline.experiments.reproduce import Job, reproduce
from tropd.pipeline.run.cells import FOLDER, REFERENCE, Cell
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation import evaluate as stage
from tropd.pipeline.stages.evaluation import lm_eval
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.evaluation.harness.judging import fetch_questions
from tropd.storage.errors import ConfigError, DataError, FingerprintMismatchError, TropdError
from tropd.storage.verify.verify import verify_workspace

IFBENCH = """
[[evaluation.benchmarks]]
name = "IFBench"
problems = "data/ifbench.jsonl"
samples = 3
lighteval = { task = "ifbench_test", module = "lighteval.tasks.tasks.ifbench.main", metric = "prompt_level_loose_acc" }
"""
CODE = """
[[evaluation.benchmarks]]
name = "LCB"
problems = "data/lcb.jsonl"
lighteval = { task = "lcb:codegeneration_v6", module = "lighteval.tasks.tasks.lcb.main" }
"""
BEFORE = ("before",)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = make_environment(tmp_path / "environment")
    monkeypatch.setenv("TROPD_BENCH_HARNESS", str(made))
    return made


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Run]:
    models = make_models(tmp_path / "models")
    return lambda extra: make_run(
        tmp_path / "run",
        models,
        prompts=4,
        extra=f"[evaluation]\ndistance_prompts = 0\nlimit = 2\n{extra}",
    )


def again(run: Run, old: str = "", new: str = "") -> Run:
    text = run.workspace.config_path.read_text().replace(old, new)
    return Run(run.workspace, parse_config(text), run.reporter)


def no_model(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a model was loaded")


def calls(environment: Path) -> list[str]:
    return (environment / "calls").read_text().split()


def test_questions_are_fetched_asked_and_judged_once(
    environment: Path, make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(IFBENCH)
    with pytest.raises(DataError, match=r"ifbench\.jsonl does not exist") as missing:
        evaluate(run, whom=BEFORE)
    assert "tropd fetch" in str(missing.value.hint)
    assert fetch_questions(run) == ["data/ifbench.jsonl"]
    assert fetch_questions(run) == []
    questions = [json.loads(line) for line in (run.workspace.root / "data" / "ifbench.jsonl").open()]
    assert [row["prompt"] for row in questions] == ["0+1=", "1+1=", "2+1=", "3+1=\u2028"]
    manifest = evaluate(run, whom=BEFORE)
    rows = pq.read_table(run.workspace.stage("eval") / "IFBench" / "part-before.parquet").to_pylist()
    assert len(rows) == 6  # evaluation.limit = 2
    assert [row["correct"] for row in rows] == [len(row["response"]) % 2 == 0 for row in rows]
    assert {row["expected"] for row in rows} == {"judged by lighteval 0.13.0"}
    found = manifest.summary["sampled"]["IFBench"]["before"]
    assert found["average"]["value"] == pytest.approx(sum(row["correct"] for row in rows) / 6)
    assert [f for f in verify_workspace(run.workspace) if f.severity == "error"] == []
    assert calls(environment) == ["questions", "judge"]
    monkeypatch.setattr(stage, "open_engine", no_model)
    assert evaluate(run, whom=BEFORE).summary == manifest.summary
    assert calls(environment) == ["questions", "judge"]
    changed = again(run, "loose_acc", "strict_acc")
    with pytest.raises(FingerprintMismatchError, match=r"IFBench\.lighteval\.metric: .*loose_acc"):
        evaluate(changed, whom=BEFORE)


def test_responses_outlive_a_judge_that_fails(
    environment: Path, make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged again, nothing is sampled again; and the marks are those of one that never failed."""
    run = make(IFBENCH)
    fetch_questions(run)
    module = environment / "stand-in" / "lighteval" / "tasks" / "tasks" / "ifbench" / "main.py"
    whole = module.read_text()
    module.write_text(
        whole.replace("right =", "assert not response.text[0], 'out of memory, or so'; right =")
    )
    with pytest.raises(TropdError, match=r"lighteval failed on IFBench:[\s\S]*out of memory"):
        evaluate(run, whom=BEFORE)
    module.write_text(whole)
    monkeypatch.setattr(stage, "open_engine", no_model)
    assert evaluate(run, whom=BEFORE).complete


def test_code_runs_where_it_is_allowed_and_isolated(
    environment: Path, make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(CODE)
    assert fetch_questions(run) == []
    assert "LCB" not in evaluate(run, whom=BEFORE).summary["sampled"]
    assert not (environment / "calls").exists()
    allowed = again(run, "limit = 2", "limit = 2\nallow_code = true")
    fetch_questions(allowed)
    monkeypatch.setattr(lm_eval, "ISOLATED", ("no-such-program", "--"))
    with pytest.raises(ConfigError, match="process without network"):
        evaluate(allowed, whom=BEFORE, force=True)
    prefix = ("env", "ALONE=1")
    monkeypatch.setattr(lm_eval, "ISOLATED", prefix)
    monkeypatch.setattr("tropd.pipeline.stages.evaluation.harness.environment.ISOLATED", prefix)
    found = evaluate(allowed, whom=BEFORE, force=True).summary["sampled"]["LCB"]["before"]
    assert found["average"]["value"] == 1.0


@pytest.mark.parametrize(
    ("old", "new", "error", "told"),
    [
        ("ifbench_test", "ifbench", TropdError, "no task 'ifbench' in .*, but ifbench_test, ifbench_multi"),
        (', metric = "prompt_level_loose_acc"', "", TropdError, "has several metrics: set metric to one of"),
        ("prompt_level_loose_acc", "loose", TropdError, "has no metric 'loose', but prompt_level_strict"),
        ("prompt_level_loose_acc", "share", TropdError, "gives 0.5 for a response"),
        ("ifbench.main", "nowhere", TropdError, "No module named 'lighteval.tasks.tasks.nowhere'"),
        ("samples = 3", "template = 'x {prompt}'", ConfigError, "template would have no effect"),
    ],
)
def test_a_task_that_cannot_be_judged_is_refused_before_the_long_stages(
    environment: Path, make: Callable[[str], Run], old: str, new: str, error: type[TropdError], told: str
) -> None:
    with pytest.raises(error, match=told):
        fetch_questions(again(make(IFBENCH), old, new))


def test_files_that_do_not_fit_are_refused(environment: Path, make: Callable[[str], Run]) -> None:
    run = make(IFBENCH)
    fetch_questions(run)
    records = run.workspace.root / "data" / "ifbench.records.jsonl"
    kept = records.read_text()
    records.unlink()
    with pytest.raises(DataError, match=r"ifbench\.records\.jsonl does not exist"):
        evaluate(run, whom=BEFORE)
    records.write_text(kept.replace('"n": 1', '"n": 9'))
    with pytest.raises(TropdError, match="lacks a question that was asked"):
        evaluate(run, whom=BEFORE)


def test_the_marks_reach_the_table_beside_the_papers(
    environment: Path, make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it costs days to train is left out: every row's student is the one before."""
    row = {"label": "TrOPD", "objective": "tropd", "paper": {"IFBench": 42.18, "LiveCodeBench-v6": 36.0}}
    whole = load_table("table4", rehearse=True).settings[0]
    setting = Setting.model_validate(whole.model_dump() | {"rows": [row], "sft_from": None})
    models = json.dumps(str(tmp_path / "models"))
    make("")
    data = tmp_path / "table" / setting.name / "data"
    data.mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "data" / "eval.jsonl", data / "eval.jsonl")

    def stand_in(run: Run, objectives: list[str], seeds: int, **options: int) -> list[Cell]:
        evaluate(run, whom=("before", "teacher"))
        cell = Cell("tropd", 0)
        for folder in (run.workspace.root / FOLDER / REFERENCE, cell.folder(run.workspace.root)):
            shutil.copytree(run.workspace.stage("eval"), folder / "eval")
            for part in folder.rglob("part-before.parquet"):
                shutil.copy(part, part.with_name("part-after.parquet"))
        return [cell]

    for name in ("generate_prefixes", "score_teacher", "fetch_sources"):
        monkeypatch.setattr(making, name, lambda *a, **o: None)
    monkeypatch.setattr(making, "compare", stand_in)
    settings = (
        f"student.model={models}",
        f"teacher.model={models}",
        "demo.enabled=false",
        "rollout.max_tokens=12",
        "evaluation.distance_prompts=0",
        "evaluation.limit=2",
    )
    table = PaperTable(title="one row", settings=(setting,))
    (block,) = reproduce(Job(tmp_path / "table", "table4", table, False, 1, 1, settings), SILENT).blocks
    assert block.benchmarks == ["held-out", "IFBench", "LiveCodeBench-v6"]
    student, _, trained = block.rows
    assert trained.values["IFBench"].paper == 42.18
    assert trained.values["IFBench"].value == student.values["IFBench"].value
    assert trained.paper_only == {"LiveCodeBench-v6": 36.0}
    assert (data / "ifbench.records.jsonl").is_file()
    assert "(paper 42.18)" in (tmp_path / "table" / "table4.md").read_text()
