"""Training with teachers that run elsewhere: several, one that is away, vLLM's, and one that is nowhere here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import load_model, load_tokenizer
from tropd.storage.disk.atomic import content_digest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "teacher"))

from running import fake_vllm, running
from waiting import eventually

SCRIPT = Path(sys.executable).with_name("tropd")


def metrics(workspace: Path) -> list[dict[str, Any]]:
    path = workspace / "train" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_server_that_is_away_does_not_hold_up_training(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    urls = f"teacher.url=['http://127.0.0.1:9', '{teacher_url}']"
    result = tropd.ok("train", "-w", workspace, "--set", urls)
    assert "the teacher at http://127.0.0.1:9 does not answer" in result.output
    assert f"teacher at {teacher_url}: tropd, teacher, weights" in result.output
    assert "teacher at http://127.0.0.1:9: does not answer yet" in result.output
    retries = [record["teacher_retries"] for record in metrics(workspace)]
    assert all(len(each) == 2 and each[1] == 0 for each in retries)
    log = [json.loads(line) for line in (prepared / "logs" / "teacher-access.jsonl").read_text().splitlines()]
    scored = [line for line in log if line["path"] == "/v1/score" and line["status"] == 200]
    assert sum(line["items"] for line in scored) > 0


def test_without_a_teacher_here_its_identity_is_what_the_service_says(
    tropd: Any, prepared: Path, finished: Path, copy: Any, teacher_url: str
) -> None:
    workspace = copy(prepared)
    shutil.rmtree(workspace / "models" / "teacher")
    result = tropd.ok("train", "-w", workspace, "--set", f"teacher.url={teacher_url}")
    assert "teacher.model = 'models/teacher' is not on this machine" in result.output
    assert content_digest(workspace / "train" / "final") == content_digest(finished / "train" / "final")
    one, two = (json.loads((w / "train" / "manifest.json").read_text()) for w in (workspace, finished))
    assert one["fingerprint"] == two["fingerprint"]


def test_a_vllm_server_teaches_the_same(tropd: Any, prepared: Path, finished: Path, copy: Any) -> None:
    workspace = copy(prepared)
    folder = prepared / "models" / "teacher"
    model, tokenizer = load_model(folder, dtype="float32", device=torch.device("cpu")), load_tokenizer(folder)
    app = fake_vllm(TransformersEngine(model, [1]), decode=tokenizer.decode)
    with running(app) as url:
        result = tropd.ok("train", "-w", workspace, "--set", f"teacher.url={url}")
        assert "vLLM, /models/teacher, at most 127 tokens, top 12, no entropy" in result.output
        assert "does not report its weights" in result.output
        refused = tropd(
            "train",
            "-w",
            copy(prepared, name="other"),
            "--set",
            f"teacher.url={url}",
            "--set",
            "objective.k=13",
        )
    assert refused.code == 2, refused.output
    assert "start it with --max-logprobs 21" in refused.output
    for mine, theirs in zip(metrics(workspace)[:3], metrics(finished)[:3], strict=True):
        for name in ("k1_mean", "region_fraction_outlier", "topk_teacher_mass", "loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        assert mine["teacher_topk_tokens"] == theirs["teacher_topk_tokens"]
        assert mine["teacher_bytes_received"] > 3 * theirs["teacher_bytes_received"]


def test_a_teacher_that_is_too_short_is_refused(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    (workspace / "models" / "manifest.json").unlink()  # models of the user's own
    path = workspace / "models" / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 30}))
    result = tropd("train", "-w", workspace)
    assert result.code == 2, result.output
    assert "but the teacher takes 30" in " ".join(result.output.split())
    assert not (workspace / "train" / "metrics.jsonl").exists()


@pytest.mark.slowest
def test_ctrl_c_while_the_teacher_is_away_acts_at_once(prepared: Path, copy: Any) -> None:
    workspace = copy(prepared)
    teacher = subprocess.Popen(
        [sys.executable, "-m", "tropd.cli.main", "serve-teacher", "-w", str(prepared), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert teacher.stdout is not None
    url = json.loads(teacher.stdout.readline())["url"]
    options = [
        f"teacher.url={url}",
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "teacher.timeout_seconds=300",
    ]
    settings = [part for option in options for part in ("--set", option)]
    trainer = subprocess.Popen(
        [str(SCRIPT), "train", "-w", str(workspace), *settings], stderr=subprocess.PIPE, text=True
    )
    assert trainer.stderr is not None
    try:
        eventually(lambda: len(metrics(workspace)) >= 2, 60, "two steps are on record")
        teacher.kill()
        output = ""
        while "nothing is lost" not in output:
            line = trainer.stderr.readline()
            assert line, output
            output += line
        started = time.monotonic()
        trainer.send_signal(signal.SIGINT)
        output += trainer.stderr.read()
        assert trainer.wait(30) == 130, output
        assert time.monotonic() - started < 20  # not the 300 s of the wait
    finally:
        trainer.kill()
        teacher.kill()
        trainer.wait()
        teacher.wait()
    assert "while waiting for the teacher; a checkpoint was saved" in " ".join(output.split())
    (checkpoint,) = (workspace / "train" / "checkpoints").iterdir()
    steps = int(checkpoint.name.removeprefix("step-"))
    assert [record["step"] for record in metrics(workspace)] == list(range(steps))
