"""The prepare stage when things go wrong: killed at chosen points, its second process lost, started over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "support"))  # also where a process of its own imports this

from waiting import eventually

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.experiments.demo import prepare as module
from tropd.pipeline.experiments.demo.prepare import prepare
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.stage.manifest import read_manifest
from tropd.storage.workspace import Workspace

CONFIG = """
[objective]
name = "opd"
[demo]
enabled = true
train_problems = 50
eval_problems = 25
teacher_steps = 4
student_steps = 3
spoil_steps = 2
"""
STAGES = ("data", "models")
ROLES = ("teacher", "student")
WEIGHTS = "model.safetensors"
# Where a process kills itself: after this many calls of the function, before or after the call does its work.
KILLS = (
    ("write_text_atomic", 1, "before"),
    ("write_text_atomic", 2, "after"),
    ("Stage.commit", 3, "before"),  # a model is there, the manifest does not name it
    ("Stage.commit", 3, "after"),  # one model of two
    ("atomic_directory", 2, "before"),
    ("Stage.finish", 2, "before"),  # both models are there
)
# Imports once, then forks one child per kill: nothing but imports has happened before, so forking is safe.
KILLER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_prepare_resumed import make_run
from tropd.pipeline.experiments.demo import prepare as module
from tropd.storage.stage.stage import Stage
os.cpu_count = lambda: 1
for line in sys.stdin:
    folder, name, count, when = json.loads(line)
    pid = os.fork()
    if pid == 0:
        owner = Stage if name.startswith("Stage.") else module
        name = name.removeprefix("Stage.")
        original, calls = getattr(owner, name), []
        def lethal(*args, **kwargs):
            calls.append(None)
            if len(calls) < count:
                return original(*args, **kwargs)
            if when == "after":
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(owner, name, lethal)
        module.prepare(make_run(Path(folder)))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def make_run(folder: Path, *assignments: str) -> Run:
    """A workspace of a tiny demo run, not prepared yet."""
    return Run(Workspace.create(folder), parse_config(CONFIG, assignments), SILENT)


def digests(run: Run) -> dict[str, str]:
    return {stage: content_digest(run.workspace.stage(stage)) for stage in STAGES}


def spawned(process: psutil.Process) -> list[psutil.Process]:
    """Children of a process that multiprocessing has started."""
    return [p for p in process.children() if any("spawn_main" in part for part in p.cmdline())]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model after the other, in this process: no second process to import everything."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        prepare(run)
    return run


def test_the_models_are_plain_directories_of_the_documented_sizes(undisturbed: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for role, layers, hidden in (("teacher", 3, 96), ("student", 2, 64)):
        folder = undisturbed.workspace.stage("models") / role
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, hidden)
        assert model.config.tie_word_embeddings
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
        assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.usefixtures("one_core")
def test_only_what_is_missing_is_trained(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    roles: list[str] = []
    train = module.train_and_save

    def stop_after_one(role: str, *args: Any) -> None:
        if roles:
            raise KeyboardInterrupt
        roles.append(role)
        train(role, *args)

    monkeypatch.setattr(module, "train_and_save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        prepare(run)
    manifest = read_manifest(run.workspace.stage("models"))
    assert manifest is not None
    assert (list(manifest.shards), manifest.complete) == (roles, False)

    def other_only(role: str, *args: Any) -> None:
        assert role not in roles
        train(role, *args)

    monkeypatch.setattr(module, "train_and_save", other_only)
    prepare(run)
    assert digests(run) == digests(undisturbed)


@pytest.mark.usefixtures("one_core")
def test_force_starts_over_and_keeps_the_old_output_aside(undisturbed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    prepare(run)
    changed = make_run(tmp_path, "run.seed=5")
    prepare(changed, force=True)
    for file in ("data/train.jsonl", "data/eval.jsonl", *(f"models/{r}/{WEIGHTS}" for r in ROLES)):
        assert content_digest(tmp_path / file) != content_digest(undisturbed.workspace.root / file), file
    for stage in STAGES:
        assert content_digest(tmp_path / f"{stage}.old-1") == digests(undisturbed)[stage]


@pytest.mark.slow
@pytest.mark.slowest
def test_a_kill_at_any_point_and_a_rerun_end_as_if_nothing_had_happened(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    commands = [json.dumps([str(tmp_path / str(i)), *kill]) for i, kill in enumerate(KILLS)]
    codes, _ = killer.communicate("\n".join(commands) + "\n")
    assert codes.split() == [str(-signal.SIGKILL)] * len(KILLS)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    for number in range(len(KILLS)):
        run = make_run(tmp_path / str(number))
        prepare(run)
        assert digests(run) == digests(undisturbed), KILLS[number]


@pytest.mark.slowest
def test_the_second_process_ends_with_a_killed_first(undisturbed: Run, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "os.cpu_count = lambda: 2\n"
        "from test_prepare_resumed import make_run, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(make_run(Path(sys.argv[2]), 'demo.teacher_steps=100000', 'demo.student_steps=100000'))\n"
    )
    file = tmp_path / "main.py"
    file.write_text(script)
    first = subprocess.Popen([sys.executable, file, Path(__file__).parent, tmp_path / "run"])
    watched = psutil.Process(first.pid)
    try:
        second = eventually(lambda: spawned(watched), 60, "the second process has started")
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    _, lingering = psutil.wait_procs(second, timeout=60)
    for process in lingering:  # a failing test must not leave a core busy for hours
        process.kill()
    assert not lingering


def test_a_lost_second_process_is_noticed_at_once_and_no_other_child_is_ended(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    unrelated = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    unrelated.start()
    me = psutil.Process()
    known = set(me.children())

    def kill_the_second() -> None:
        for process in eventually(lambda: set(spawned(me)) - known, 60, "the second process has started"):
            process.kill()

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    try:
        # So long a teacher would not be waited for within the test's time limit.
        with pytest.raises(TropdError, match="the process that makes the student ended without a result"):
            prepare(make_run(tmp_path, "demo.teacher_steps=100000"))
        assert unrelated.is_alive()
    finally:
        killer.join()
        unrelated.kill()
        unrelated.join()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("demo.train_max_operations=2", "min_operations (3) is above train_max_operations (2)"),
        ("demo.eval_max_operations=2", "min_operations (3) is above eval_max_operations (2)"),
        ("demo.eval_min_operations=6", "eval_min_operations (6) is above max_operations (5)"),
    ],
)
def test_impossible_numbers_of_operations_are_refused(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_run(tmp_path, assignment)
    assert message in str(refused.value)
