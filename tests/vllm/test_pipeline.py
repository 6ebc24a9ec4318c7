"""The whole pipeline with vLLM for prefixes, scores, service and rollouts, against the same run with transformers."""

from __future__ import annotations

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


@pytest.mark.timeout(900)
def test_a_run_on_vllm_is_as_good_as_one_on_transformers(demo: Any, alone: Any, stage: Any) -> None:
    # Other prefixes teach other things (which few prompts have none decides the first steps): all learn from the same.
    again = demo.copy("prefixes-again")
    shutil.rmtree(again / "prefixes")
    kept = stage("generate-prefixes", again, "--set", "teacher.engine=vllm")["kept_fraction"]
    assert abs(kept - demo.kept) < 0.01
    plain = demo.copy("transformers")
    for name in ("score-teacher", "train"):
        stage(name, plain)
    accuracy = stage("evaluate", plain)["accuracy"]
    assert accuracy["after"]["sampled"] > accuracy["before"]["sampled"] + 0.3
    for mode in ("greedy", "sampled"):
        for who in ("teacher", "after"):
            difference = alone.accuracy[who][mode] - accuracy[who][mode]
            # 2 points were seen; on another processor rounding sends both trainings other ways.
            assert abs(difference) <= 0.05, (who, mode, accuracy, alone.accuracy)
    query = "SELECT max(sampler_logprob_difference_max) FROM metrics"
    worst = run_query(Workspace.open(alone.workspace), query).rows[0][0]
    assert worst < 1e-4  # engine and trainer have the same weights in every step


@pytest.mark.timeout(600)
def test_both_engines_fill_the_cache_alike(tmp_path: Path, stage: Any) -> None:
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
    stage("prepare", plain, *small)
    few = (*small, "--set", "data.limit=60", "--set", "prefixes.keep=all")
    stage("generate-prefixes", plain, *few)
    shutil.copytree(plain, fast)
    stage("score-teacher", plain, *few)
    stage("score-teacher", fast, *few, "--set", "teacher.engine=vllm")
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
def test_rollouts_ahead_are_made_with_weights_one_update_old(tmp_path: Path, stage: Any) -> None:
    workspace = tmp_path / "run"
    subprocess.run([TROPD, "init", workspace, "--recipe", "demo"], check=True)
    small = [f"demo.{role}_steps=60" for role in ("teacher", "student")]
    small += ["demo.train_problems=80", "objective.name=opd", "train.evaluate_every=0"]
    options = [part for assignment in small for part in ("--set", assignment)]
    stage("prepare", workspace, *options)
    # Every step but the last asks the engine for its log-probs of some rows: they are the trainer's, or it stops.
    ahead = ("student.engine=vllm", "train.max_staleness=1", "train.steps=8", "train.learning_rate=1e-3")
    ahead += ("train.warmup_steps=0", "vllm.check_every=1", "vllm.max_mean_difference=1e-4")
    stage("train", workspace, *options, *(part for assignment in ahead for part in ("--set", assignment)))
    rows = run_query(
        Workspace.open(workspace),
        "SELECT importance_max FROM metrics WHERE step > 0 ORDER BY step",
    ).rows
    assert len(rows) == 7
    assert all(row[0] > 1.001 for row in rows)  # the rows themselves are those of the weights before
