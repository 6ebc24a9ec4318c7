"""Every file of a workspace damaged in every way: the same bits, or the file is named and nothing else is lost."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from damage import COMMANDS, DAMAGES, OLDER, Answer, answer, damage, fault, files, read_only, tree

STATES = ("interrupted", "finished")
# By default, for each command what it would be worst to get wrong, and one file of each kind.
SAMPLE = (
    ("interrupted", "train", "deleted", "train/manifest.json"),
    ("interrupted", "train", "older", "train/manifest.json"),
    ("interrupted", "train", "torn", "train/metrics.jsonl"),
    ("interrupted", "train", "flipped", "train/checkpoints/step-000004/state.json"),
    ("interrupted", "train", "halved", "models/student/model.safetensors"),
    ("interrupted", "train", "deleted", "models/student/generation_config.json"),
    ("interrupted", "train", "deleted", "prefixes/manifest.json"),
    ("interrupted", "train", "emptied", "config.toml"),
    ("interrupted", "train", "flipped", "scores/part-00000.zarr/counts/c/0"),
    ("interrupted", "verify", "flipped", "train/metrics.jsonl"),
    ("interrupted", "verify", "deleted", "prefixes/manifest.json"),
    ("interrupted", "verify", "older", "train/samples.jsonl"),
    ("finished", "train", "flipped", "train/final/model.safetensors"),
    ("finished", "train", "deleted", "train/samples.jsonl"),
    ("finished", "train", "halved", "train/samples.jsonl"),
    ("finished", "train", "flipped", "train/metrics.jsonl"),
    ("finished", "evaluate", "flipped", "data/eval.jsonl"),
    ("finished", "evaluate", "halved", "eval/part-after.parquet"),
    ("finished", "evaluate", "flipped", "eval/part-before.parquet"),
    ("finished", "evaluate", "flipped", "eval/distance-after.parquet"),
    ("finished", "report", "torn", "eval/manifest.json"),
)


@dataclass(frozen=True)
class Bench:
    """Workspaces to damage, the answers that they give undamaged, and room for copies."""

    states: dict[str, Path]
    earlier: Path
    tropd: Any
    options: list[str]
    answers: dict[tuple[str, str], Answer]
    room: Path

    def run(self, workspace: Path, command: str) -> tuple[Answer, str]:
        if command in ("report", "verify"):
            return read_only(workspace, command)
        result = self.tropd(command, "-w", workspace, *(self.options if command == "train" else []))
        return answer(workspace, command, result.code, result.output), result.output

    def copy(self, state: str) -> Path:
        workspace = self.room / "run"
        shutil.rmtree(workspace, ignore_errors=True)
        shutil.copytree(self.states[state], workspace)
        return workspace

    def expected(self, state: str, command: str) -> Answer:
        if (state, command) not in self.answers:
            self.answers[state, command] = self.run(self.copy(state), command)[0]
        return self.answers[state, command]

    def check(self, state: str, command: str, how: str, name: str) -> str:
        """What is wrong, in words; empty if the command holds."""
        expected = self.expected(state, command)
        workspace = self.copy(state)
        if not damage(workspace, name, how, self.earlier):
            return ""
        before = tree(workspace)
        found, output = self.run(workspace, command)
        return fault(name, command, before, workspace, found, expected, output)


@pytest.fixture(scope="module")
def bench(
    tropd: Any, prepared: Path, finished: Path, teacher_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    room = tmp_path_factory.mktemp("damage")
    options = ["--set", f"teacher.url={teacher_url}"]
    stopped = room / "stopped"
    shutil.copytree(prepared, stopped)
    assert tropd("train", "-w", stopped, *options, stop_at=2).code == 130
    shutil.copytree(stopped, room / "earlier")
    assert tropd("train", "-w", stopped, *options, stop_at=4).code == 130
    shutil.copytree(finished, room / "finished")
    tropd.ok("report", "-w", room / "finished")
    return Bench(
        {"interrupted": stopped, "finished": room / "finished"}, room / "earlier", tropd, options, {}, room
    )


@pytest.mark.slowest
@pytest.mark.parametrize(("state", "command", "how", "name"), SAMPLE)
def test_a_damaged_file_is_named_or_changes_nothing(
    bench: Bench, state: str, command: str, how: str, name: str
) -> None:
    assert bench.check(state, command, how, name) == ""


@pytest.mark.thorough  # thousands of commands
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", STATES)
def test_every_file_damaged_in_every_way(bench: Bench, state: str, command: str) -> None:
    faults, cases = [], 0
    for name in files(bench.states[state]):
        for how in (*DAMAGES, OLDER):
            cases += 1
            if found := bench.check(state, command, how, name):
                faults.append(f"{name} {how}: {found}")
                print(faults[-1], flush=True)
    print(f"{state} {command}: {cases} cases")
    assert faults == []
