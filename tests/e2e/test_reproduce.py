"""The paper's tables: complete as data, planned without GPU or network, rehearsed, killed, and resumed to the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropd.pipeline.config.paper_tables import AVERAGE, ELSEWHERE, load_table, table_names
from tropd.pipeline.config.recipe_files import load_objective, recipe_text
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.reproduce import MeasuredNumber, Result, ResultBlock, ResultRow, to_markdown

KILLS = 3 if os.environ.get("TROPD_THOROUGH") else 1
TINY = {
    "demo.train_problems": 24,
    "demo.eval_problems": 16,
    "demo.teacher_steps": 20,
    "demo.student_steps": 8,
    "demo.spoil_steps": 2,
    "prefixes.keep": "all",
    "prefixes.shard_prompts": 8,
    "rollout.prompts_per_step": 4,
    "sft.steps": 3,
    "sft.prompts_per_step": 4,
    "train.steps": 4,
    "train.warmup_steps": 0,
    "train.checkpoint_every": 2,
    "evaluation.limit": 8,
}


def command(root: Path, *more: str) -> list[str]:
    settings = [part for name, value in TINY.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return ["reproduce", "table4", "-w", str(root), "--rehearse", *settings, *more]


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.slowest
def test_a_rehearsal_that_is_killed_ends_with_the_same_table(tropd: Any, tmp_path: Path) -> None:
    first = tropd.ok(*command(tmp_path / "undisturbed"))
    expected = (tmp_path / "undisturbed" / "table4.json").read_text()
    found = json.loads(expected)
    assert [row["label"] for row in found["blocks"][0]["rows"]] == [
        "student before",
        "teacher",
        "OPD",
        "EOPD",
        "Entropy-OPD",
        "REOPOLD",
        "TrOPD",
    ]
    assert "| TrOPD |" in first.output
    assert (tmp_path / "undisturbed" / "qwen3" / "sft" / "train" / "final").is_dir()
    for moment in np.random.default_rng(4).uniform(0.15, 0.35, size=KILLS):
        killed = tropd(*command(tmp_path / "killed"), after=float(moment) * first.seconds)
        assert killed.code == -signal.SIGKILL, killed.output
    tropd.ok(*command(tmp_path / "killed"))
    assert (tmp_path / "killed" / "table4.json").read_text() == expected
    again = tropd.ok(*command(tmp_path / "killed"))
    assert again.seconds < first.seconds


@pytest.mark.parametrize("name", table_names())
def test_every_table_names_what_there_is(name: str) -> None:
    for setting in load_table(name, rehearse=False).settings:
        config = parse_config(recipe_text(setting.recipe), where=setting.recipe).config
        assert (config.train.steps, config.train.learning_rate, config.objective.k) == (200, 5e-6, 64)
        assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (128, 4)
        assert [b.samples for b in config.evaluation.benchmarks] == [32, 32, 32]
        for row in setting.rows:
            load_objective(row.objective, {})
            assert set(row.paper) <= {b.name for b in config.evaluation.benchmarks} | {*ELSEWHERE, AVERAGE}


def test_the_tables_have_the_numbers_of_all_columns() -> None:
    """The mean of the paper's columns is the average that it gives."""
    checked = 0
    for name in table_names():
        for setting in load_table(name, rehearse=False).settings:
            for label, paper in [
                ("before", setting.paper_before),
                *((r.label, r.paper) for r in setting.rows),
            ]:
                given = {column: value for column, value in paper.items() if column != AVERAGE}
                if paper:
                    assert sum(given.values()) / len(given) == pytest.approx(paper[AVERAGE], abs=0.02), label
                    checked += 1
    assert checked >= 30


def test_the_papers_own_numbers_say_how_many_responses_there_were() -> None:
    """Each is a multiple of one over questions times responses, to the two decimals that are given."""
    checked = 0
    for name in table_names():
        for setting in load_table(name, rehearse=False).settings:
            for paper in (setting.paper_before, setting.paper_teacher, *(row.paper for row in setting.rows)):
                for column, one in ELSEWHERE.items():
                    if column in paper:
                        count = one.problems * one.samples
                        nearest = round(round(paper[column] / 100 * count) / count * 100, 2)
                        assert nearest == pytest.approx(paper[column], abs=0.0051), (name, column)
                        checked += 1
    assert checked >= 50


def test_what_a_harness_measured_stands_beside_the_paper() -> None:
    block = ResultBlock(
        title="models",
        benchmarks=["AIME24", "GPQA-Diamond", "IFBench"],
        rows=[
            ResultRow(
                label="OPD",
                values={"AIME24": MeasuredNumber(value=30.0, low=20.0, high=40.0, paper=35.83)},
                paper_only={"GPQA-Diamond": 28.03},
            )
        ],
    )
    text = to_markdown(Result(title="table", rehearsal=False, seeds=1, blocks=[block]))
    assert "| OPD | 30.0 [20.0, 40.0] (paper 35.83) | – (paper 28.03) | – |" in text


def test_a_dry_run_needs_no_gpu_and_no_network(
    tropd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On eight GPUs nothing says no, and what is not checked is said; vLLM's usual share leaves the teacher no room."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = tropd.ok("reproduce", "table3", "-w", tmp_path, "--dry-run", "--gpus", "8").output
    for words in (
        "GPU-hours",
        "tropd compare",
        "disk",
        "sizes are those of the table",
        "planned for 8, here are 0",
        "downloads: 18.8 GB",
        "lighteval's gpqa:diamond, 198 questions, avg@4",
        "allow_code=true",
    ):
        assert words in shown
    assert " NO: " not in shown
    more = ("--set", "vllm.gpu_memory_utilization=0.85", "--json")
    refused = tropd("reproduce", "table3", "-w", tmp_path, "--dry-run", *more)
    assert refused.code == 2, refused.output
    plans = json.loads(refused.output[refused.output.index("[\n") :])
    assert [plan["title"].split(" ← ")[1] for plan in plans] == ["Skywork-OR1-Math-7B", "Skywork-OR1-7B"]
    assert all(stage["gpu_hours"] >= 0 for plan in plans for stage in plan["stages"])
    wrong = [check["what"] for check in plans[0]["checks"] if check["holds"] is False]
    assert any("student in vLLM (68.0 GB): vllm.gpu_memory_utilization" in what for what in wrong)
    unknown = tropd("reproduce", "table9", "-w", tmp_path)
    assert unknown.code == 2
    assert "table3, table4, table5, table6" in unknown.output
