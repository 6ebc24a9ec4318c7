"""`make demo-llm` in small: the real model from the package registry, through every stage, stopped on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.experiments.demo.smollm2 import NOT_FOUND

SMALL = (
    *("runtime.threads=1", "demo.train_problems=32", "demo.eval_problems=8", "prefixes.limit=16"),
    *("rollout.prompts_per_step=4", "rollout.max_tokens=16", "train.steps=3", "train.warmup_steps=0"),
    *("train.checkpoint_every=2", "evaluation.samples=1"),
)
OFFLINE = "the package registry cannot be reached"


def registry_answers(folder: Path) -> bool:
    """Whether pip gets a package that is certainly there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), "pip"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.slowest
@pytest.mark.first
@pytest.mark.timeout(600)
def test_the_demo_with_a_real_model(tropd: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    run = tmp_path / "llm"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    demo = ("demo", "--workspace", run, "--recipe", "demo-llm", *settings)
    stopped = tropd(*demo, stop_at=1)
    if NOT_FOUND in stopped.output and not registry_answers(tmp_path / "probe"):
        pytest.skip(OFFLINE)
    assert stopped.code == 130, stopped.output
    assert not (run / "train" / "final").exists()
    result = tropd.ok(*demo)
    assert "done before, nothing to do" in result.output  # the models
    assert (run / "report" / "index.html").stat().st_size > 10_000
    records = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["k1_mean"] > 0.5  # nats: a broken student
    assert records[0]["sampler_logprob_difference_max"] < 1e-3
    accuracy = json.loads((run / "eval" / "manifest.json").read_text())["summary"]["accuracy"]
    assert set(accuracy) == {"before", "after", "teacher"}
