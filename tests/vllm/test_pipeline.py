"""The whole pipeline with vLLM for prefixes, scores, service and rollouts, against the same run with transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment that has it")

from tropd.storage.cache.shard import read_topk
from tropd.storage.catalog import run_query
from tropd.storage.workspace import Workspace

TROPD = Path(sys.executable).with_name("tropd")
BOTH = ("--set", "teacher.engine=vllm", "--set", "student.engine=vllm")


def run(stage: str, workspace: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [TROPD, stage, "-w", workspace, *options, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(900)
def test_a_run_on_vllm_is_as_good_as_one_on_transformers(tmp_path: Path) -> None:
    plain, fast = tmp_path / "transformers", tmp_path / "vllm"
    subprocess.run([TROPD, "init", plain, "--recipe", "demo"], check=True)
    run("prepare", plain)
    shutil.copytree(plain, fast)
    kept = [
        run("generate-prefixes", workspace, *options)["kept_fraction"]
        for workspace, options in ((plain, ()), (fast, BOTH))
    ]
    assert abs(kept[0] - kept[1]) < 0.01
    # Other prefixes teach other things (which few prompts have none decides the first steps): both learn from the same.
    shutil.rmtree(fast / "prefixes")
    shutil.copytree(plain / "prefixes", fast / "prefixes")
    accuracy = {}
    for workspace, options in ((plain, ()), (fast, BOTH)):
        run("score-teacher", workspace, *options)
        run("train", workspace, *options)
        accuracy[workspace] = run("evaluate", workspace, *options)["accuracy"]
    assert accuracy[plain]["after"]["sampled"] > accuracy[plain]["before"]["sampled"] + 0.3
    for mode in ("greedy", "sampled"):
        for who in ("teacher", "after"):
            difference = accuracy[fast][who][mode] - accuracy[plain][who][mode]
            # 2 points were seen; on another processor rounding sends both trainings other ways.
            assert abs(difference) <= 0.05, (who, mode, accuracy)
    worst = run_query(Workspace.open(fast), "SELECT max(sampler_logprob_difference_max) FROM metrics").rows[
        0
    ][0]
    assert worst < 1e-4  # engine and trainer have the same weights in every step


@pytest.mark.timeout(600)
def test_both_engines_fill_the_cache_alike(tmp_path: Path) -> None:
    plain, fast = tmp_path / "transformers", tmp_path / "vllm"
    subprocess.run([TROPD, "init", plain, "--recipe", "demo"], check=True)
    small = (
        "--set",
        "demo.teacher_steps=60",
        "--set",
        "demo.student_steps=20",
        "--set",
        "demo.train_problems=80",
    )
    run("prepare", plain, *small)
    few = (*small, "--set", "data.limit=60", "--set", "prefixes.keep=all")
    run("generate-prefixes", plain, *few)
    shutil.copytree(plain, fast)
    run("score-teacher", plain, *few)
    run("score-teacher", fast, *few, "--set", "teacher.engine=vllm")
    for path in sorted((plain / "scores").glob("*.zarr")):
        one, other = read_topk(path), read_topk(fast / "scores" / path.name)
        np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-4)
        # A token at the edge of the mass may keep one alternative more: such tokens are few, the others are equal.
        same = one.counts == other.counts
        assert same.mean() > 0.99
        where, there = np.repeat(same, one.counts), np.repeat(same, other.counts)
        np.testing.assert_allclose(
            one.logprobs[where].astype(np.float32),
            other.logprobs[there].astype(np.float32),
            rtol=2e-3,
            atol=1e-3,
        )
        assert (one.ids[where] == other.ids[there]).mean() > 0.99


@pytest.mark.timeout(600)
def test_rollouts_ahead_are_made_with_weights_one_update_old(tmp_path: Path) -> None:
    workspace = tmp_path / "run"
    subprocess.run([TROPD, "init", workspace, "--recipe", "demo"], check=True)
    small = [f"demo.{role}_steps=60" for role in ("teacher", "student")]
    small += ["demo.train_problems=80", "objective.name=opd", "train.evaluate_every=0"]
    options = [part for assignment in small for part in ("--set", assignment)]
    run("prepare", workspace, *options)
    # Every step but the last asks the engine for its log-probs of some rows: they are the trainer's, or it stops.
    ahead = ("student.engine=vllm", "train.max_staleness=1", "train.steps=8", "train.learning_rate=1e-3")
    ahead += ("train.warmup_steps=0", "vllm.check_every=1", "vllm.max_mean_difference=1e-4")
    run("train", workspace, *options, *(part for assignment in ahead for part in ("--set", assignment)))
    rows = run_query(
        Workspace.open(workspace),
        "SELECT importance_max FROM metrics WHERE step > 0 ORDER BY step",
    ).rows
    assert len(rows) == 7
    assert all(row[0] > 1.001 for row in rows)  # the rows themselves are those of the weights before
