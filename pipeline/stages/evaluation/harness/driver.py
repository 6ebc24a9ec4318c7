"""Runs within lighteval's environment, as a script: writes the questions of a task, and judges responses to them.

    driver.py questions '{"task": …, "module": …, "metric": …}' QUESTIONS RECORDS
    driver.py judge     '{…}' RECORDS RESPONSES VERDICTS

A record is a question as lighteval's metric needs it, with its solution or tests. Each response is judged by itself, so
that the mean over responses is lighteval's own pass@1, and its interval can be had over problems.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lighteval.metrics import apply_metric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.registry import Registry
from lighteval.tasks.requests import Doc, SamplingMethod

VERSION = version("lighteval")
KEPT = ("query", "choices", "gold_index", "instruction", "specific")
SEED = 1234
"""That of lighteval's own runs; GPQA's choices are shuffled with it."""


def questions(wanted: dict[str, Any], target: Path, records: Path) -> None:
    """Write each question's prompt to ``target``, and its record to ``records``."""
    random.seed(SEED)
    configs = task_configs(wanted)
    prompts = PromptManager()
    tried = False
    with target.open("w", encoding="utf-8") as asked, records.open("w", encoding="utf-8") as kept:
        for name, config in configs.items():
            task = LightevalTask(config=config)
            LightevalTask.load_datasets({name: task})
            for doc in task.get_docs():
                fields = {field: getattr(doc, field) for field in KEPT}
                line = json.dumps({"task": name, "lighteval": VERSION, **fields}, sort_keys=True)
                if not tried:  # what a metric downloads, or lacks, is found before the long stages
                    mark_of(config, wanted["metric"], json.loads(line), "")
                    tried = True
                prompt = prompts.prepare_prompt_api(doc)[-1]["content"]
                row = {
                    "id": f"{name}/{doc.id}",
                    "prompt": prompt,
                    "answer": f"judged by lighteval {VERSION}",
                    "record": hashlib.sha256(line.encode()).hexdigest(),
                }
                print(json.dumps(row, ensure_ascii=False), file=asked)
                print(line, file=kept)


def mark_all(wanted: dict[str, Any], records: Path, responses: Path, verdicts: Path) -> None:
    """Write 0 or 1 for each response; these name their questions by the record's digest."""
    configs = task_configs(wanted)
    known = {hashlib.sha256(line.encode()).hexdigest(): json.loads(line) for line in _lines(records)}
    with verdicts.open("w", encoding="utf-8") as out:
        for line in _lines(responses):
            row = json.loads(line)
            record = known.get(row["record"])
            if record is None:
                sys.exit(
                    f"{records} lacks a question that was asked: both files are made anew by tropd fetch --force"
                )
            if record["lighteval"] != VERSION:
                sys.exit(
                    f"the questions are those of lighteval {record['lighteval']}, and {VERSION} is installed here"
                )
            print(mark_of(configs[record["task"]], wanted["metric"], record, row["response"]), file=out)


def task_configs(wanted: dict[str, Any]) -> dict[str, Any]:
    """Configurations of a task, or of all those of a group, by full name; of their metrics those that judge a text.

    Only the task's own module is loaded: some others download data when they are imported.
    """
    table = Registry.create_custom_tasks_module(wanted["module"]).TASKS_TABLE
    task = wanted["task"]
    configs = {}
    for config in sorted(table, key=lambda one: one.name):
        if config.name == task or config.name.startswith(f"{task}:"):
            config.num_fewshots, config.full_name = 0, f"{config.name}|0"
            config.metrics = [one for one in config.metrics if one.category == SamplingMethod.GENERATIVE]
            for metric in config.metrics:
                for field in ("k", "n"):  # pass@1 of one response
                    if hasattr(metric.sample_level_fn, field):
                        setattr(metric.sample_level_fn, field, 1)
            configs[config.full_name] = config
    if not configs:
        sys.exit(f"no task {task!r} in {wanted['module']}, but {', '.join(one.name for one in table)}")
    return configs


def mark_of(config: Any, metric: str | None, record: dict[str, Any], response: str) -> int:
    """The metric of one response: 0 or 1."""
    fields = {name: record[name] for name in KEPT}
    doc = Doc(task_name=record["task"], **fields)
    found = apply_metric(responses=[ModelResponse(text=[response])], docs=[doc], metrics=config.metrics)[0]
    if metric is None and len(found) > 1:
        sys.exit(f"{config.name} has several metrics: set metric to one of {', '.join(found)}")
    name = next(iter(found)) if metric is None else metric
    if name not in found:
        sys.exit(f"{config.name} has no metric {name!r}, but {', '.join(found)}")
    value = float(found[name])
    if value not in (0.0, 1.0):
        sys.exit(f"{name} of {config.name} gives {value} for a response, which is neither right nor wrong")
    return int(value)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")


if __name__ == "__main__":
    mode, settings, *paths = sys.argv[1:]
    (questions if mode == "questions" else mark_all)(json.loads(settings), *map(Path, paths))
