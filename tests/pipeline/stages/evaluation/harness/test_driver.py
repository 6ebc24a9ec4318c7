"""The driver in the real environment of lighteval (make bench-harness): its tasks, and its marks, without network."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tropd.pipeline.config.paper_tables import ELSEWHERE
from tropd.pipeline.stages.evaluation.harness.environment import (
    DRIVER,
    call_driver,
    environment_folder,
    has_environment,
)
from tropd.pipeline.stages.evaluation.lm_eval import can_isolate

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not has_environment(), reason="lighteval is not installed: make bench-harness"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
LISTING = """
import json, runpy, sys
configs = runpy.run_path(sys.argv[1])["task_configs"](json.loads(sys.argv[2]))
print("LISTED" + json.dumps([[c.hf_repo, [m.metric_name for m in c.metrics]] for c in configs.values()]))
"""
OWN_TASKS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc
from lighteval.tasks.tasks.lcb.main import lcb_codegen_metric

def choice(line, task_name=None):
    return Doc(task_name=task_name, query=line["q"], choices=["A", "B", "C", "D"], gold_index=line["n"])

def program(line, task_name=None):
    tests = {{"inputs": ["3\\n", "5\\n"], "outputs": ["6\\n", "10\\n"], "fn_name": None}}
    return Doc(task_name=task_name, query=line["q"], choices=[""], gold_index=0, specific=tests)

def task(name, prompt, metrics):
    return LightevalTaskConfig(
        name=name, prompt_function=prompt, hf_repo={folder!r}, hf_subset="default", hf_avail_splits=["test"],
        evaluation_splits=["test"], few_shots_split=None, few_shots_select=None, generation_size=8, metrics=metrics,
        stop_sequence=[], version=0,
    )

TASKS_TABLE = [
    task("choices", choice, [Metrics.gpqa_instruct_pass_at_k(sample_params={{"k": 1}})]),
    task("redux", choice, [Metrics.loglikelihood_acc, Metrics.pass_at_k_letters(sample_params={{"k": 1}})]),
    task("lcb:own", program, [lcb_codegen_metric]),
]
"""
DOUBLES = "```python\nprint(2 * int(input()))\n```"
CASES = {
    "choices": [("Thus it is B.\n\nAnswer: B", "0"), ("Answer: A", "1"), ("Answer: $C$", "0"), ("", "0")],
    "redux": [("The answer is A.", "1"), ("The answer is D.", "0"), ("A", "1"), ("", "0")],
    "lcb:own": [
        (f"So:\n{DOUBLES}", "1"),
        ("```python\nprint(1)\n```", "0"),
        ("no code", "0"),
        # The network is none of its own: what asks for another machine fails, and the program with it.
        (f"```python\nimport socket\nsocket.create_connection(('192.0.2.1', 80), 2)\n{DOUBLES[10:]}", "0"),
    ],
}


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_the_benchmarks_of_the_tables_are_there(name: str) -> None:
    one = ELSEWHERE[name]
    wanted = {"task": one.task, "module": f"lighteval.tasks.tasks.{one.module}"}
    command = [environment_folder() / "bin" / "python", "-I", "-c", LISTING, DRIVER, json.dumps(wanted)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(said.rpartition("LISTED")[2])
    assert len(found) == (57 if name == "MMLU-Redux" else 1)
    assert {repository for repository, _ in found} == {one.dataset}
    metrics = {str(metric) for _, names in found for metric in names}
    assert len(metrics) == 1  # which may be a group of several
    assert one.metric is None or one.metric in metrics.pop()


@pytest.mark.parametrize("task", sorted(CASES))
def test_a_task_of_ones_own_is_asked_and_judged(task: str, tmp_path: Path) -> None:
    if task.startswith("lcb") and not can_isolate():
        pytest.skip("a network namespace is not permitted here")
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text(
        "".join(json.dumps({"q": f"question {n}", "n": n}) + "\n" for n in range(4))
    )
    module = tmp_path / "own_tasks.py"
    module.write_text(OWN_TASKS.format(folder=str(data)))
    wanted = json.dumps({"task": task, "module": str(module), "metric": None})
    asked, records, given, marks = (tmp_path / name for name in ("asked", "records", "given", "marks"))
    call_driver(
        task,
        ["questions", wanted, str(asked), str(records)],
        seconds=200,
        log=tmp_path / "log",
        variables=OFFLINE,
    )
    questions = {row["prompt"]: row for row in map(json.loads, asked.open())}
    assert sorted(questions) == [f"question {n}" for n in range(4)]
    first = questions["question 0"]["record"]
    with given.open("w") as out:
        for response, _ in CASES[task]:
            print(json.dumps({"record": first, "response": response}), file=out)
    call_driver(
        task,
        ["judge", wanted, str(records), str(given), str(marks)],
        seconds=200,
        log=tmp_path / "log",
        isolated=task.startswith("lcb"),
        variables=OFFLINE,
    )
    assert marks.read_text().split() == [mark for _, mark in CASES[task]]
