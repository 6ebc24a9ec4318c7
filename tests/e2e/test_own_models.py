"""Three commands for one's own models: init, run, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tropd.pipeline.config.resolve import load_config

SMALL = (
    *("train.steps=2", "rollout.prompts_per_step=4", "rollout.max_tokens=8"),
    *("evaluation.limit=4", "evaluation.distance_prompts=4", "prefixes.limit=8"),
)


def test_three_commands_for_own_models(tropd: Any, prepared: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "mine"
    models = [f"--{role}={prepared / 'models' / role}" for role in ("teacher", "student")]
    prompts = tmp_path / "questions.jsonl"
    records = [json.loads(line) for line in (prepared / "data" / "train.jsonl").read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"question": r["prompt"]}) + "\n" for r in records))
    settings = [part for setting in SMALL for part in ("--set", setting)]
    made = tropd.ok("init", workspace, *models, "--prompts", prompts, *settings)
    assert "evaluation is by distance to the teacher alone" in made.output
    assert "time, estimated from a measurement: " in made.output
    assert "recipe" not in (workspace / "config.toml").read_text()
    assert load_config(workspace / "config.toml").config.data.prompt_field == "question"
    done = tropd.ok("run", "-w", workspace)
    assert "reverse KL" in done.output
    tropd.ok("report", "-w", workspace)
    found = json.loads(tropd.ok("status", "-w", workspace, "--json").output)
    assert found["next_command"] is None
    assert "nothing to do" in tropd.ok("run", "-w", workspace).output
