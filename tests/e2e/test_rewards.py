"""Training with rewards: from the grader, a function, stored rollouts; killed, changed, and without any."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import final, metrics

from tropd.storage.formats.samples_file import read_samples
from tropd.storage.formats.trajectories import read_trajectories

FOUR = ("--set", "rollout.samples_per_prompt=4", "--set", "rollout.prompts_per_step=4")
FUNCTION = """
def reward(rows):
    assert {tuple(sorted(row)) for row in rows} == {
        ("answer", "domain", "id", "messages", "prompt", "response", "token_ids", "truncated")
    }
    found = [len(row["response"]) % 7 / 7 for row in rows]
    return [None if row["id"].endswith("3") else value for row, value in zip(rows, found)]
"""


def with_objective(workspace: Path, name: str, reward: str = "") -> Path:
    """The workspace with this method, and a [reward] section."""
    path = workspace / "config.toml"
    text = path.read_text()
    before = next(line for line in text.splitlines() if line.startswith("name = "))
    path.write_text(text.replace(before, f'name = "{name}"') + (f"\n[reward]\n{reward}\n" if reward else ""))
    return workspace


@pytest.mark.slowest
def test_rewards_alone_train_without_a_teacher(tropd: Any, prepared: Path, copy: Any) -> None:
    reward = 'source = "function"\nfunction = "own:reward"\nmissing = "drop"'
    workspace = with_objective(copy(prepared), "grpo", reward)
    (workspace / "own.py").write_text(FUNCTION)
    # The address leads nowhere: nothing may ask it.
    tropd.ok("train", "-w", workspace, *FOUR, "--set", "teacher.url=http://127.0.0.1:9")
    found = metrics(workspace)
    assert all(0 <= record["reward_correct_fraction"] <= 1 for record in found)
    assert len({record["reward_mean"] for record in found}) > 1
    assert all(0 <= record["reward_groups_without_spread"] <= 1 for record in found)
    assert all(record["teacher_tokens_scored"] == 0 and record["k1_mean"] is None for record in found)
    assert any(record["grad_norm"] > 0 for record in found)
    samples, damaged = read_samples(workspace / "train" / "samples.jsonl")
    assert not damaged
    shown = {response.reward for sample in samples for response in sample.responses}
    assert shown <= {n / 7 for n in range(7)}
    assert len(shown) > 1
    tropd.ok("report", "-w", workspace)
    page = (workspace / "report" / "index.html").read_text()
    assert "prompts without spread" in page
    assert "the teacher was not asked" in page


@pytest.mark.slow
@pytest.mark.slowest
@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_killed_run_with_a_function_ends_with_the_same_bits(
    tropd: Any, prepared: Path, copy: Any, teacher_url: str, staleness: int
) -> None:
    reward = 'source = "function"\nfunction = "own:reward"\nmissing = "drop"\nbatch_rows = 4'
    options = ["--set", f"teacher.url={teacher_url}", "--set", f"train.max_staleness={staleness}", *FOUR]
    options += ["--set", "train.steps=24", "--set", "train.checkpoint_every=3"]
    undisturbed, killed = (
        with_objective(copy(prepared, name=name), "scope", reward) for name in ("undisturbed", "killed")
    )
    for workspace in (undisturbed, killed):
        (workspace / "own.py").write_text(FUNCTION)
    took = tropd.ok("train", "-w", undisturbed, *options).seconds
    expected = metrics(undisturbed)
    assert any(record["rows_without_reward"] for record in expected)
    generator = np.random.default_rng(staleness)
    for _ in range(2):
        done = tropd("train", "-w", killed, *options, after=float(generator.uniform(0.4, 0.8) * took))
        assert done.code in (0, -signal.SIGKILL), done.output
    tropd.ok("train", "-w", killed, *options)
    assert final(killed) == final(undisturbed)
    assert metrics(killed) == expected

    # A changed function is another reward, wherever it changed.
    (killed / "own.py").write_text(FUNCTION.replace("% 7 / 7", "% 5 / 5"))
    refused = tropd("train", "-w", killed, *options)
    assert refused.code == 1
    assert "reward.function_source" in refused.output


def test_a_function_that_fails_stops_the_run_and_says_where(tropd: Any, prepared: Path, copy: Any) -> None:
    reward = 'source = "function"\nfunction = "own:reward"'
    workspace = with_objective(copy(prepared), "grpo", reward)
    absent = tropd("train", "-w", workspace, *FOUR)
    assert absent.code == 2
    assert "there is no module 'own'" in absent.output
    (workspace / "own.py").write_text("def reward(rows):\n    return [1 / 0 for row in rows]\n")
    failed = tropd("train", "-w", workspace, *FOUR)
    assert failed.code == 1
    assert "step 0, prompt " in failed.output
    assert "ZeroDivisionError" in failed.output
    assert "own.py line 2" in failed.output


@pytest.mark.slow
@pytest.mark.slowest
def test_a_reward_that_tells_nothing_apart_is_said(tropd: Any, prepared: Path, copy: Any) -> None:
    workspace = with_objective(copy(prepared), "grpo", 'source = "function"\nfunction = "own:reward"')
    (workspace / "own.py").write_text("def reward(rows):\n    return [0.0 for row in rows]\n")
    tropd.ok("train", "-w", workspace, *FOUR, "--set", "train.steps=15")
    told = tropd.ok("status", "-w", workspace).output
    assert "For 100.0 % of the prompts all responses have the same reward" in told.replace("\u00a0", " ")


def test_prompts_without_answers_are_refused_before_anything_is_loaded(
    tropd: Any, prepared: Path, copy: Any
) -> None:
    workspace = with_objective(copy(prepared), "grpo")
    path = workspace / "data" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1].pop("answer")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    refused = tropd("train", "-w", workspace, *FOUR, "--set", "prefixes.keep=all")
    assert refused.code == 1
    assert f"prompt {records[1]['id']!r} (line 2 of " in refused.output
    assert 'reward.missing = "drop"' in refused.output


@pytest.mark.slowest
def test_rewards_of_stored_rollouts(tropd: Any, prepared: Path, copy: Any) -> None:
    reward = 'source = "field"\nfield = "score"\nfile = "rewards.jsonl"'
    workspace = with_objective(copy(prepared), "offline-opd", reward)
    options = [*FOUR, "--set", "objective.reward.kind=group"]
    tropd.ok("generate-rollouts", "-w", workspace, *options)
    tropd.ok("score-teacher", "-w", workspace, "--source", "rollouts", *options)
    rows = [
        row
        for path in sorted((workspace / "rollouts").glob("part-*.parquet"))
        for row in read_trajectories(path)
    ]
    records = [
        {"prompt_id": row.prompt_id, "sample_index": row.sample_index, "score": row.sample_index / 4}
        for row in rows
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (workspace / "rewards.jsonl").write_text("".join(lines))
    tropd.ok("train", "-w", workspace, *options)
    assert all(record["reward_mean"] == 0.375 for record in metrics(workspace))
    (workspace / "rewards.jsonl").write_text("".join(lines[:-1]))
    changed = tropd("train", "-w", workspace, *options)
    assert changed.code == 1
    assert "reward.file" in changed.output
