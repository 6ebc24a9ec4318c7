"""What README and docs tell people to type does what they say: every command is run, or it is said here why not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.objective_list import list_objectives
from tropd.pipeline.config.recipe_files import recipe_names
from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.objectives.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from test_docs import PAGES, command_lines, resolve

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
# Commands that are not run here. Everything else is, on a small workspace.
NOT_RUN = {
    r"…|\[|TASK_ID": "a pattern, not a command",
    r"^reproduce ": "days on GPUs; tests/e2e/test_reproduce.py has its dry run and its rehearsal",
    r"^compare\b": "minutes; tests/e2e/test_pipeline.py and the tutorial below run it",
    r"^demo ": "minutes; tests/e2e/test_pipeline.py runs it",
    r"--executor ray": "needs a cluster of Ray; tests/pipeline/stages/test_shards.py and tests/e2e/test_gpus.py have one",
    r"^serve-teacher": "runs until it is stopped; tests/e2e/test_teacher_servers.py",
    r"teacher\.url=": "needs the server that it names; tests/e2e/test_teacher_servers.py",
    r"^fetch": "needs the reader's sources; tests/pipeline/stages/test_fetch.py",
    r"^sft": "tests/e2e/test_reproduce.py",
    r"^train -w W --set": "another run than the one that is there; tests/e2e/test_training_ahead.py",
    r"^report -w W/compare": "of a comparison; tests/e2e/test_pipeline.py",
    r"^init\b": "the tutorial below runs it",
    r"runs/mine": "models of the reader; tests/e2e/test_own_models.py",
    r"^doctor": "tests/pipeline/experiments/doctor/test_examine.py",
    r"runs/first": "the tutorial below",
}
COMMANDS = sorted({line for page in PAGES if page != TUTORIAL for line in command_lines(page)})
RUN = [line for line in COMMANDS if not any(re.search(pattern, line) for pattern in NOT_RUN)]


def test_most_commands_are_run_and_every_reason_is_needed() -> None:
    assert len(RUN) > 20
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in COMMANDS)]
    assert unused in ([], ["runs/first"])


@pytest.fixture(scope="module")
def whole(tropd: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Places that the docs name, with a finished run in each."""
    folder = tmp_path_factory.mktemp("docs")
    runs = {name: folder / name for name in ("W", "V", "U", "OTHER")}
    for place in runs.values():
        shutil.copytree(finished, place)
    tropd.ok("generate-rollouts", "-w", runs["W"])
    tropd.ok("score-teacher", "-w", runs["W"], "--source", "rollouts")
    named = {name: str(path) for name, path in runs.items()}
    return {
        **named,
        "/shared/W": named["W"],
        "FILE": str(folder / "a.parquet"),
        "N": "2",
        "NAME": "tropd",
    }


@pytest.mark.parametrize("line", RUN)
def test_a_documented_command_succeeds(tropd: Any, whole: dict[str, str], tmp_path: Path, line: str) -> None:
    places = whole | {"DIR": str(tmp_path / "dir")}
    words = [places.get(word, word) for word in shlex.split(line)]
    command, _ = resolve([word.strip("[],.:") for word in words])
    asks = {option for parameter in command.params if parameter.required for option in parameter.opts}
    if "--workspace" in asks and "-w" not in words:  # named in passing
        words += ["-w", whole["W"]]
    result = tropd(*words)
    assert result.code == 0, result.output


@pytest.mark.slowest
def test_the_tutorial_runs_as_written(tropd: Any, prepared: Path, tmp_path: Path) -> None:
    lines = [
        line.strip().removeprefix("tropd ")
        for line in TUTORIAL.read_text().splitlines()
        if line.startswith("    tropd ")
        and line.split()[1].isalpha() | ("-" in line.split()[1])
        and "runs/mine" not in line  # models of the reader; tests/e2e/test_own_models.py
    ]
    assert len(lines) >= 20
    for line in lines:
        words = [re.sub(r"^runs/", f"{tmp_path}/", word) for word in shlex.split(line)]
        result = tropd(*words)
        # The one that the page says is refused.
        refused = line == "train -w runs/first --set objective.name=opd"
        assert result.code == (1 if refused else 0), f"{line}: {result.output}"
        if refused:
            assert "made with other settings or inputs" in result.output
        if line == "init runs/first --recipe demo":
            smaller = (prepared / "config.toml").read_text()
            (tmp_path / "first" / "config.toml").write_text(smaller)
    final = json.loads((tmp_path / "first" / "train" / "manifest.json").read_text())
    assert final["complete"]
    assert final["summary"]["objective"] == "offline-opd"


def test_the_method_page_lists_every_method_and_names_code_that_exists() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|", text.split("## Methods")[1], re.MULTILINE)
    assert rows == [(entry.name, entry.title, entry.needs) for entry in list_objectives()]
    code = "\n".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    for name in re.findall(r"`([a-z]\w*_\w+)`", text.split("## Methods")[0]):
        assert re.search(rf"(def |\"|\b){name}(\"|\(|\b)", code), name


def test_the_recipe_page_lists_every_recipe_and_its_example_is_an_objective() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert sorted(re.findall(r"^\| `([\w.-]+)` \|", text, re.MULTILINE)) == recipe_names()
    examples = [
        "\n".join(line.removeprefix("    ") for line in block.splitlines())
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    ]
    changed = next(example for example in examples if example.strip().startswith("[objective]"))
    objective = parse_config(changed).config.objective
    assert objective.partition.rule == "ratio"
    own = next(example for example in examples if 'name = "mine"' in example)
    assert Objective.model_validate(tomllib.loads(own)).outlier.loss == objective.outlier.loss
