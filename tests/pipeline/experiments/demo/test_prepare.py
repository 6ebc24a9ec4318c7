"""The ``prepare`` stage: one result per seed, however it is computed; reuse, refusals, and no process left behind."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.experiments.demo import prepare as module
from tropd.pipeline.experiments.demo.prepare import prepare
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.run.progress import SILENT, Task
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError, FingerprintMismatchError
from tropd.storage.workspace import Workspace

CONFIG = """
[objective]
name = "tropd"

[demo]
enabled = true
train_problems = 50
eval_problems = 25
teacher_steps = 3
student_steps = 2
spoil_steps = 2
"""


class Listener:
    """Collects messages and progress."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.done = 0.0

    @contextmanager
    def task(self, description: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        self.total = total
        self.done = done
        yield self

    def advance(self, amount: float = 1, **values: object) -> None:
        self.done += amount

    def info(self, message: str) -> None:
        self.messages.append(message)

    warning = info


def run(root: Path, *assignments: str, reporter: Any = SILENT) -> Run:
    return Run(Workspace.create(root), parse_config(CONFIG, assignments), reporter)


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process, which takes seconds to start, but where a test asks for it."""
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared workspace."""
    root: Path = tmp_path_factory.mktemp("prepare") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "cpu_count", lambda: 1)
        prepare(run(root))
    return root


def digests(root: Path) -> tuple[str, str]:
    return content_digest(root / "models"), content_digest(root / "data")


@pytest.mark.slowest
def test_the_same_result_one_after_the_other_and_side_by_side(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores in (1, 2):
        monkeypatch.setattr(module.os, "cpu_count", lambda cores=cores: cores)
        listener = Listener()
        prepare(run(tmp_path / str(cores), reporter=listener))
        assert digests(tmp_path / str(cores)) == digests(made)
        assert listener.done == listener.total == 7


def test_another_seed_makes_other_models_and_problems(made: Path, tmp_path: Path) -> None:
    prepare(run(tmp_path, "run.seed=1"))
    assert all(a != b for a, b in zip(digests(tmp_path), digests(made), strict=True))


def test_the_problems_are_fair_disjoint_and_readable(made: Path) -> None:
    files = {
        name: scan_prompts(made / "data" / f"{name}.jsonl", DataConfig(), need_answer=True)[0]
        for name in ("train", "eval")
    }
    assert [len(f) for f in files.values()] == [50, 25]
    assert not {p.text for p in files["train"]} & {p.text for p in files["eval"]}
    for prompts in files.values():
        most = Counter(p.answer for p in prompts).most_common(1)[0][1]
        assert most / len(prompts) <= 0.12


def test_what_is_done_is_not_done_again(made: Path) -> None:
    before, listener = digests(made), Listener()
    times = [p.stat().st_mtime_ns for p in sorted(made.rglob("*")) if p.is_file() and "logs" not in p.parts]
    prepare(run(made, reporter=listener))
    assert listener.messages == ["prepare: done before, nothing to do"]
    assert digests(made) == before
    assert times == [
        p.stat().st_mtime_ns for p in sorted(made.rglob("*")) if p.is_file() and "logs" not in p.parts
    ]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("demo.teacher_steps=4", "demo.teacher_steps: 3 → 4"),
        ("demo.spoil=terse", "demo.spoil: 'noisy' → 'terse'"),
        ("demo.eval_problems=26", "demo.eval_problems: 25 → 26"),
        ("run.seed=2", "run.seed: 0 → 2"),
    ],
)
def test_a_changed_field_is_refused_by_name(made: Path, assignment: str, words: str) -> None:
    before = digests(made)
    with pytest.raises(FingerprintMismatchError, match=words):
        prepare(run(made, assignment))
    assert digests(made) == before


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("demo.enabled=false", "demo.enabled is false"),
        (
            "teacher.model=elsewhere",
            r"teacher\.model = 'elsewhere', but tropd prepare writes 'models/teacher'",
        ),
        ("data.evaluation=other.jsonl", r"data\.evaluation = 'other\.jsonl'"),
    ],
)
def test_other_peoples_models_and_data_are_left_alone(tmp_path: Path, assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(run(tmp_path, assignment))
    assert [p.name for p in tmp_path.iterdir()] == ["workspace.json"]


@pytest.mark.slowest
def test_an_interruption_ends_the_child_and_is_resumed_to_the_same_result(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)

    class Impatient(Listener):
        def advance(self, amount: float = 1, **values: object) -> None:
            raise KeyboardInterrupt

    others = set(multiprocessing.active_children())  # such as the grader's workers, of tests before this one
    with pytest.raises(KeyboardInterrupt):
        prepare(run(tmp_path, reporter=Impatient()))
    assert set(multiprocessing.active_children()) <= others
    prepare(run(tmp_path))
    assert digests(tmp_path) == digests(made)
