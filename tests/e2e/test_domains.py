"""Two domains, two teachers, and a local service for each: every token is judged by the teacher of its domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def domain_of(prompt_id: str) -> str:
    return "own" if sum(map(ord, prompt_id)) % 2 else "other"


@pytest.fixture
def workspace(prepared: Path, copy: Any) -> Path:
    """Prompts of domain ``own`` have the student as it starts for their teacher."""
    made: Path = copy(prepared, "prefixes", "scores")
    path = made / "data" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    marked = [{**record, "domain": domain_of(record["id"])} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in marked))
    with (made / "config.toml").open("a") as config:
        config.write('\n[[teacher.by_domain]]\ndomain = "own"\nmodel = "models/student"\ndtype = "float32"\n')
    return made


@pytest.mark.slowest
def test_every_token_is_judged_by_the_teacher_of_its_domain(tropd: Any, workspace: Path) -> None:
    for stage in ("generate-prefixes", "score-teacher"):
        tropd.ok(stage, "-w", workspace)
    settings = ("--set", "train.steps=1")
    result = tropd.ok("train", "-w", workspace, *settings)
    assert "starting a local teacher service\n" in result.output
    assert "starting a local teacher service for own" in result.output
    (line,) = (workspace / "train" / "samples.jsonl").read_text().splitlines()
    seen = set()
    for response in json.loads(line)["responses"]:
        domain = domain_of(response["prompt_id"])
        seen.add(domain)
        differences = [abs(t["teacher_logprob"] - t["student_logprob"]) for t in response["tokens"]]
        assert (max(differences) < 1e-3) == (domain == "own"), domain
    assert seen == {"own", "other"}
    (record,) = (workspace / "train" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(record)
    assert found["teacher_tokens_scored"] == found["tokens_on_policy"]
    assert len(found["teacher_retries"]) == 2
    assert tropd.ok("verify", "-w", workspace)
    assert "nothing to do" in tropd.ok("train", "-w", workspace, *settings).output


def test_a_domain_that_no_prompt_has_is_refused_before_anything_is_loaded(
    tropd: Any, workspace: Path
) -> None:
    config = (workspace / "config.toml").read_text()
    (workspace / "config.toml").write_text(config.replace('domain = "own"', 'domain = "law"'))
    refused = tropd("generate-prefixes", "-w", workspace)
    assert refused.code == 2
    assert "'law', which no training prompt has" in refused.output
