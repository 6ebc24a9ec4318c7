"""Real runs that go wrong say so where people look: in the terminal, in status, on the report's page."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def verdicts(tropd: Any, workspace: Path) -> dict[str, dict[str, Any]]:
    output = tropd.ok("status", "-w", workspace, "--json").output
    found = json.loads(output[output.index("{") :])["verdicts"]
    return {one["name"]: one for one in found}


def test_a_grader_that_does_not_fit(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished, "eval")
    choice = ("--set", "evaluation.grader=choice", "--set", "evaluation.max_tokens=36")
    ended = tropd.ok("evaluate", "-w", workspace, *choice)
    assert "problem: The grader 'choice' finds no answer in" in ended.output
    found = verdicts(tropd, workspace)["grader-misfit"]
    assert len(found["evidence"]) == 3
    assert all("no answer found, expected “" in line for line in found["evidence"])
    assert "`evaluation.grader`" in found["advice"]
    shown = tropd.ok("status", "-w", workspace)
    assert "problem: The grader 'choice' finds no answer in" in shown.output


def train(tropd: Any, workspace: Path, *settings: str) -> str:
    return str(
        tropd.ok("train", "-w", workspace, *(word for one in settings for word in ("--set", one))).output
    )


def test_a_learning_rate_that_is_far_too_high(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    far = ["objective.name=opd", "train.learning_rate=0.03", "train.max_grad_norm=0.001", "train.steps=20"]
    output = train(tropd, workspace, *far, f"teacher.url={teacher_url}")
    assert "warning: The gradient is always clipped: its norm is" in output
    found = verdicts(tropd, workspace)["gradient-clipped"]
    assert found["evidence"][0].endswith("train.max_grad_norm is 0.001")
    report = tropd.ok("report", "-w", workspace)
    assert "warning: The gradient is always clipped" in report.output
    assert "This run has not been evaluated yet." in report.output


def test_a_student_that_does_not_stop(tropd: Any, prepared: Path, copy: Any, teacher_url: str) -> None:
    workspace = copy(prepared)
    short = ["objective.name=opd", "train.learning_rate=1e-9", "rollout.max_tokens=3", "train.steps=15"]
    output = train(tropd, workspace, *short, f"teacher.url={teacher_url}")
    assert "problem: The student does not stop: " in output
    assert "never-stops" in verdicts(tropd, workspace)


def answers_two(student: Path) -> None:
    """Replace a model by one that writes “#2” after any “=”: each token follows from the last one alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    config = model.config
    config.tie_word_embeddings = False
    config.rms_norm_eps = 1e-6
    made = type(model)(config)
    chain = [*tokenizer("=#2", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for name, weights in made.named_parameters():
            weights.fill_(1.0) if "norm" in name else weights.zero_()
        rows = min(config.vocab_size, config.hidden_size)
        made.model.embed_tokens.weight[:rows, :rows] = torch.eye(rows)
        for last, following in pairwise(chain):
            made.lm_head.weight[following, last] = 10.0
    made.save_pretrained(student)


def test_a_student_that_answers_everything_alike(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    shutil.copytree(workspace / "models" / "student", workspace / "constant")
    answers_two(workspace / "constant")
    still = ["student.model=constant", "objective.name=sft", "objective.schedule.length=max"]
    still += ["train.learning_rate=1e-12", "train.steps=1", "evaluation.distance_prompts=0"]
    train(tropd, workspace, *still)
    settings = [word for one in still for word in ("--set", one)]
    ended = tropd.ok("evaluate", "-w", workspace, *settings)
    assert (
        "problem: The student answers nearly everything alike: 100.0\u00a0% of its answers are “2”."
        in ended.output
    )
    assert verdicts(tropd, workspace)["constant-answer"]["evidence"][1].startswith("“")


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demos_are_silent_where_they_go_well_and_tell_a_collapse(tropd: Any, tmp_path: Path) -> None:
    for recipe in ("demo", "demo-mismatch"):
        tropd.ok("demo", "-w", tmp_path / recipe, "--recipe", recipe)
        assert verdicts(tropd, tmp_path / recipe) == {}
    collapsed = tmp_path / "collapsed"
    shutil.copytree(tmp_path / "demo-mismatch", collapsed, ignore=shutil.ignore_patterns("train", "eval"))
    opd = ("-w", collapsed, "--set", "objective.name=opd")
    tropd.ok("train", *opd)
    tropd.ok("evaluate", *opd)
    assert verdicts(tropd, collapsed)
