"""Checks of a table's columns that lighteval measures: its environment, the questions, and leave to run code."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tropd.pipeline.config.paper_tables import ELSEWHERE, Elsewhere, Setting
from tropd.pipeline.config.sections.evaluation_settings import Benchmark
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.harness.environment import MADE_BY, has_environment
from tropd.pipeline.stages.evaluation.harness.judging import records_file
from tropd.pipeline.stages.evaluation.lm_eval import can_isolate
from tropd.pipeline.training.preflight.checks import Check

ALONE = "not measured, the paper's number stands alone"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_elsewhere(run: Run, setting: Setting, *, runs_here: bool) -> Iterator[Check]:
    """What each column of lighteval's needs, and whether it is there; one that is not measured is said to be so.

    Args:
        runs_here: the table is about to be made: an environment that is not there counts.
    """
    have = {one.name: one for one in run.config.evaluation.benchmarks}
    by_lm_eval = {task.name for task in run.config.evaluation.harness}
    for name in (name for name in setting.columns if name in ELSEWHERE and name not in by_lm_eval):
        if name not in have:
            block = ELSEWHERE[name].settings(name).strip()
            yield Check(None, f"{name}: {ALONE}; to measure it, {run.workspace.config_path} needs\n{block}")
        elif have[name] not in run.config.benchmarks:
            text = "it runs code that the model wrote (--set evaluation.allow_code=true measures it)"
            yield Check(None, f"{name}: {ALONE}: {text}")
        else:
            yield _needs(run, have[name], ELSEWHERE[name], runs_here=runs_here)


def _needs(run: Run, benchmark: Benchmark, known: Elsewhere, *, runs_here: bool) -> Check:
    path = run.workspace.resolve(benchmark.problems)
    fetched = path.is_file() and records_file(path).is_file()
    missing, later = [], []
    if not has_environment():
        missing.append(f"the environment of lighteval ({MADE_BY})")
    if benchmark.runs_code and not can_isolate():
        missing.append("a process without network for the model's code (user namespaces)")
    if not fetched and known.gated and not any(os.environ.get(token) for token in TOKENS):
        later.append("an account that has accepted the dataset's terms (HF_TOKEN is not set)")
    if not fetched:
        later.append(f"a download from the hub, {known.dataset}")
    samples = benchmark.samples or run.config.evaluation.samples
    what = f"{benchmark.name}: lighteval's {known.task}, {known.problems:,} questions, avg@{samples}"
    if missing or later:
        return Check(
            False if missing and runs_here else None, f"{what}; needs {', '.join([*missing, *later])}"
        )
    return Check(True, f"{what}; the questions and lighteval are here")
