"""What goes wrong around a run: other processes, damaged files, wrong addresses, full disks, impatient people."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from waiting import eventually

from tropd.storage.disk.atomic import content_digest
from tropd.storage.formats.step_log import read_log
from tropd.storage.stage.manifest import read_manifest

SCRIPT = Path(sys.executable).with_name("tropd")


def with_url(url: str) -> list[str]:
    return ["--set", f"teacher.url={url}"]


def records(workspace: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock measured."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time_", "memory_"))}
        for record in read_log(workspace / "train" / "metrics.jsonl").whole
    ]


def final(workspace: Path) -> str:
    return content_digest(workspace / "train" / "final")


def left_of(group: int) -> list[str]:
    """Living processes of a process group."""
    listed = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def test_standard_output_holds_one_json_object_and_nothing_else(finished: Path, copy: Any) -> None:
    workspace = copy(finished)
    for command, field in (
        ("train", "teacher_tokens_scored"),
        ("status", "stages"),
        ("report", "evaluation"),
    ):
        done = subprocess.run(
            [SCRIPT, command, "-w", workspace, "--json"], capture_output=True, text=True, check=True
        )
        assert field in json.loads(done.stdout), done.stdout


def start_prepare(workspace: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """``tropd prepare`` with models that take long enough to be interrupted, and the file of what it says."""
    long = ["--set", "demo.teacher_steps=5000", "--set", "demo.student_steps=5000"]
    log = workspace.with_name("prepare.log")
    with log.open("wb") as stream:
        command = [SCRIPT, "prepare", "-w", workspace, *long]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    return process, log


@pytest.mark.slowest
@pytest.mark.parametrize("moment", ["import", "training"])
def test_ctrl_c_on_a_terminal_reaches_the_whole_group_and_shows_no_traceback(
    tropd: Any, finished: Path, copy: Any, moment: str
) -> None:
    workspace = copy(finished, "data", "models", "prefixes", "scores", "train", "eval")
    process, log = start_prepare(workspace)
    if moment == "import":
        maps = Path(f"/proc/{process.pid}/maps")
        eventually(lambda: "libtorch" in maps.read_text(), 60, "PyTorch is being loaded")
    else:
        eventually(lambda: " steps" in log.read_text(), 60, "training has begun")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    output = log.read_text()
    assert "Traceback" not in output
    assert "run the same command again to resume" in output
    eventually(lambda: not left_of(process.pid), 30, "all processes of the group have ended")
    tropd.ok("prepare", "-w", workspace)
    assert content_digest(workspace / "models") == content_digest(finished / "models")


@pytest.mark.slowest
def test_a_killed_prepare_leaves_no_process_behind(finished: Path, copy: Any) -> None:
    workspace = copy(finished, "models", "prefixes", "scores", "train", "eval")
    process, log = start_prepare(workspace)
    eventually(lambda: " steps" in log.read_text(), 60, "training has begun")
    process.kill()
    process.wait()
    eventually(lambda: not left_of(process.pid), 30, "all processes of the group have ended")


def test_ctrl_c_while_the_teacher_is_starting_ends_at_once(prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    process = subprocess.Popen(
        [SCRIPT, "train", "-w", workspace], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    seen = ""
    while "starting a local teacher service" not in seen:
        seen = process.stderr.readline()
        assert seen, "the trainer ended before it started a teacher"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert not (workspace / "train" / "metrics.jsonl").exists()


def test_a_second_writer_is_refused(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    with FileLock(workspace / ".prefixes.lock"):
        result = tropd("generate-prefixes", "-w", workspace)
    assert result.code == 1
    assert "another process is writing" in result.output


def test_a_damaged_student_is_not_evaluated_but_made_again(
    tropd: Any, finished: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(finished, "eval")
    path = workspace / "train" / "final" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # a weight: the file loads, and is wrong
    path.write_bytes(content)
    result = tropd("evaluate", "-w", workspace)
    assert result.code == 1
    assert "train/final has sha256" in result.output
    assert not (workspace / "eval" / "manifest.json").exists()
    path.write_bytes(content[:1000])
    tropd.ok("train", "-w", workspace, *with_url(teacher_url))
    tropd.ok("evaluate", "-w", workspace)
    for stage in ("train/final", "eval"):
        assert content_digest(workspace / stage) == content_digest(finished / stage)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tropd: Any, finished: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(finished, "eval")
    (newest,) = (workspace / "train" / "checkpoints" / "step-000008" / "tensors").glob("*.safetensors")
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    shutil.rmtree(workspace / "train" / "final")
    result = tropd.ok("train", "-w", workspace, *with_url(teacher_url))
    assert "resuming after step 6 of 8" in result.output
    assert final(workspace) == final(finished)
    assert records(workspace) == records(finished)
    assert tropd("verify", "-w", workspace).code == 0


@pytest.mark.parametrize(
    ("path", "size", "words"),
    [
        ("models/teacher/model.safetensors", 5000, "weights in"),
        ("models/teacher/tokenizer.json", 200, "no readable tokenizer"),
        ("models/teacher/config.json", 100, "is not JSON"),
        ("models/student/model.safetensors", 0, ""),
        ("config.toml", 30, "config.toml"),
    ],
)
def test_truncated_inputs_are_named(
    tropd: Any, finished: Path, copy: Any, path: str, size: int, words: str
) -> None:
    workspace = copy(finished, "prefixes", "scores", "train", "eval")
    (workspace / "models" / "manifest.json").unlink()  # models of the user's own
    with (workspace / path).open("r+b") as stream:
        stream.truncate(size)
    result = tropd("generate-prefixes", "-w", workspace)
    if not words:  # the student's weights are none of this stage's business
        assert result.code == 0, result.output
        return
    assert result.code in (1, 2), result.output
    assert words in result.output
    assert "internal error" not in result.output


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        pytest.param("prepare", 100_000, marks=pytest.mark.slowest),
        ("score-teacher", 1500),
        ("evaluate", 1500),
    ],
)
def test_every_stage_names_a_full_disk_and_goes_on_when_there_is_room(
    tropd: Any, finished: Path, copy: Any, command: str, limit: int
) -> None:
    folders = {"prepare": "models", "score-teacher": "scores", "evaluate": "eval"}
    workspace = copy(finished, folders[command])
    result = tropd(command, "-w", workspace, file_limit=limit)
    assert result.code == 1, result.output
    assert "disk full while writing" in result.output
    assert "internal error" not in result.output
    tropd.ok(command, "-w", workspace)
    assert content_digest(workspace / folders[command]) == content_digest(finished / folders[command])


def test_another_teacher_behind_the_address_is_refused(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    shutil.rmtree(workspace / "models" / "teacher")
    shutil.copytree(workspace / "models" / "student", workspace / "models" / "teacher")
    result = tropd("train", "-w", workspace, *with_url(teacher_url))
    assert result.code == 1, result.output
    assert "if it is another model on purpose, remove" in " ".join(result.output.split())
    (workspace / "models" / "manifest.json").unlink()  # models of the user's own
    result = tropd("train", "-w", workspace, *with_url(teacher_url))
    assert result.code == 2, result.output
    assert "has another teacher than" in result.output
    malformed = tropd("train", "-w", workspace, *with_url("localhost:8000"))
    assert malformed.code == 2
    assert "http://host:port" in malformed.output


def test_missing_problems_are_found_before_the_first_step(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    (workspace / "data" / "eval.jsonl").unlink()
    result = tropd("train", "-w", workspace, "--set", "train.evaluate_every=2")
    assert result.code == 1
    assert "eval.jsonl does not exist" in result.output
    assert not (workspace / "train" / "metrics.jsonl").exists()


def test_places_where_no_workspace_can_be(tropd: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        result = tropd("init", place, "--recipe", "demo")
        assert result.code == 2, result.output
        assert "cannot make a workspace at" in result.output
    assert tropd("demo", "-w", tmp_path / "new", "--recipe", "nope").code == 2
    assert not (tmp_path / "new").exists()


def test_trajectories_of_other_prompts_are_not_trained_on(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    path = workspace / "data" / "train.jsonl"
    first, second, *rest = path.read_text().splitlines()
    one, other = json.loads(first), json.loads(second)
    one["id"], other["id"] = other["id"], one["id"]
    path.write_text("\n".join([json.dumps(one), json.dumps(other), *rest]) + "\n")
    result = tropd("train", "-w", workspace)
    assert result.code == 1, result.output
    assert "are answers to another text" in result.output
    assert "generate-prefixes" in result.output


def test_prompts_without_trajectories_start_from_the_prompt(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    path = workspace / "data" / "train.jsonl"
    path.write_text(path.read_text().replace('"train-', '"other-'))
    tropd.ok("train", "-w", workspace, *with_url(teacher_url))
    assert {record["tokens_guidance"] for record in records(workspace)} == {0}
    sft = tropd(
        "train", "-w", workspace, "--force", "--set", "objective={name='sft', schedule={length='max'}}"
    )
    assert sft.code == 1, sft.output
    assert "no training prompt has a teacher trajectory" in sft.output


def test_scores_of_earlier_trajectories_are_not_used(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    again = ["--set", "prefixes.temperature=0.5"]
    tropd.ok("generate-prefixes", "-w", workspace, *again, "--force")
    result = tropd("train", "-w", workspace, *again, "--set", "objective={name='tropd-cached', k=5}")
    assert result.code == 2, result.output
    assert "scores of other trajectories" in result.output


def test_stored_rollouts_must_cover_the_prompts(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    tropd.ok("generate-rollouts", "-w", workspace)
    tropd.ok("score-teacher", "-w", workspace, "--source", "rollouts")
    with (workspace / "data" / "train.jsonl").open("a") as stream:
        stream.write('{"id": "new", "prompt": "1+2=", "answer": "3"}\n')
    result = tropd("train", "-w", workspace, "--set", "objective={name='offline-opd'}")
    assert result.code == 1, result.output
    assert "prompt 'new' has no stored trajectory" in result.output


def test_evaluation_does_not_depend_on_its_batch_size(tropd: Any, finished: Path, copy: Any) -> None:
    workspace = copy(finished, "eval")
    tropd.ok("evaluate", "-w", workspace, "--set", "evaluation.batch_size=5")
    found, expected = read_manifest(workspace / "eval"), read_manifest(finished / "eval")
    assert found is not None
    assert expected is not None
    assert (found.summary, found.fingerprint) == (expected.summary, expected.fingerprint)
    assert found.shards.keys() == expected.shards.keys()
    for name in found.shards:
        if not name.startswith("responses-"):
            assert content_digest(workspace / "eval" / name) == content_digest(finished / "eval" / name)
            continue
        # Rows that are decoded together round the sampler's log-probs; nothing is computed from these.
        one, other = (pq.read_table(folder / "eval" / name) for folder in (workspace, finished))
        logprobs = [
            np.concatenate(table["sampled_logprobs"].to_numpy(zero_copy_only=False)) for table in (one, other)
        ]
        np.testing.assert_allclose(*logprobs, atol=1e-5)
        assert one.drop(["sampled_logprobs"]).equals(other.drop(["sampled_logprobs"]))


@pytest.mark.parametrize(
    ("stage", "file", "folder"),
    [
        ("train", "data/train.jsonl", "train"),
        ("generate-prefixes", "data/train.jsonl", "prefixes"),
        ("evaluate", "data/eval.jsonl", "eval"),
    ],
)
def test_force_on_bad_input_leaves_what_was_there(
    tropd: Any, finished: Path, copy: Any, stage: str, file: str, folder: str
) -> None:
    workspace = copy(finished)
    (workspace / file).write_text("")
    before = content_digest(workspace / folder)
    result = tropd(stage, "-w", workspace, "--force")
    assert result.code == 1, result.output
    assert f"{file} has no prompts" in result.output
    assert content_digest(workspace / folder) == before
    assert not list(workspace.glob("*.old-*"))
    # Nothing was started for it either.
    assert not (workspace / "logs" / "teacher-service.log").exists()
