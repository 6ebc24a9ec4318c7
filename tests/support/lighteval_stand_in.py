"""An environment as make bench-harness makes it, with a stand-in for lighteval: the parts that the driver calls.

A response is right for IFBench where it has an even number of characters, and for LiveCodeBench where nothing but its own
network namespace is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

VERSION = "0.13.0"
_FILES = {
    "metrics/__init__.py": """
def apply_metric(responses, docs, metrics):
    return [metrics[0].compute(doc, response) for doc, response in zip(docs, responses)]
""",
    "models/__init__.py": "",
    "models/model_output.py": """
class ModelResponse:
    def __init__(self, text):
        self.text = text
""",
    "tasks/__init__.py": "",
    "tasks/requests.py": """
class SamplingMethod:
    GENERATIVE, LOGPROBS = "generative", "logprobs"

class Doc:
    def __init__(self, **fields):
        vars(self).update(fields)
""",
    "tasks/prompt_manager.py": """
class PromptManager:
    def prepare_prompt_api(self, doc):
        return [{"role": "user", "content": doc.query}]
""",
    "tasks/registry.py": """
from importlib import import_module

class Registry:
    create_custom_tasks_module = staticmethod(import_module)
""",
    "tasks/lighteval_task.py": """
from lighteval.tasks.requests import Doc

class LightevalTask:
    def __init__(self, config):
        self.config = config

    @staticmethod
    def load_datasets(tasks):
        if (trouble := next(iter(tasks.values())).config.trouble) is not None:
            raise RuntimeError(trouble)

    def get_docs(self):
        for number in range(4):
            yield Doc(
                id=str(number),
                query=f"{number}+1=" + "\\u2028" * (number == 3),  # an end of a line to str.splitlines
                choices=[""],
                gold_index=0,
                instruction=None,
                specific={"n": number},
            )
""",
    "tasks/tasks/__init__.py": """
from types import SimpleNamespace

class Metric:
    category = "generative"
    sample_level_fn = SimpleNamespace(k=None)

    def __init__(self, compute):
        self.compute = compute

def task(name, compute, trouble=None):
    return SimpleNamespace(name=name, metrics=[Metric(compute)], trouble=trouble)
""",
    "tasks/tasks/ifbench/__init__.py": "",
    "tasks/tasks/ifbench/main.py": """
from lighteval.tasks.tasks import task

def even(doc, response):
    right = len(response.text[0]) % 2 == 0
    return {"prompt_level_strict_acc": 0, "prompt_level_loose_acc": int(right), "share": 0.5}

TASKS_TABLE = [task("ifbench_test", even), task("ifbench_multiturn", even)]
""",
    "tasks/tasks/lcb/__init__.py": "",
    "tasks/tasks/lcb/main.py": """
import os
from lighteval.tasks.tasks import task

TASKS_TABLE = [task("lcb:codegeneration_v6", lambda doc, response: {"pass": float("ALONE" in os.environ)})]
""",
    "tasks/tasks/gpqa.py": """
from lighteval.tasks.tasks import task

TASKS_TABLE = [task("gpqa:diamond", None, "DatasetNotFoundError: 'Idavidrein/gpqa' is a gated dataset on the Hub")]
""",
}


def make_environment(folder: Path) -> Path:
    """Make it; ``calls`` beside its ``bin`` gets a line for each call: the driver's mode."""
    package = folder / "stand-in" / "lighteval"
    for name, text in {"__init__.py": "", **_FILES}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = package.parent / f"lighteval-{VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: lighteval\nVersion: {VERSION}\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    # Without -I, which would hide the stand-in.
    python.write_text(
        f'#!/bin/sh\nshift\necho "$2" >> {folder}/calls\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return folder
