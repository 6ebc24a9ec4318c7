"""The report as data: from finished, unfinished, damaged and empty workspaces."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tropd.pipeline.report.data.collect import build_report
from tropd.storage.workspace import Workspace

Tools = dict[str, Callable[..., Any]]


def as_json(workspace: Workspace) -> dict[str, Any]:
    """As a reader of the file sees it; refuses NaN and infinities, which are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the report")

    found: dict[str, Any] = json.loads(build_report(workspace).model_dump_json(), parse_constant=refuse)
    return found


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_a_finished_run(finished: Workspace, tools: Tools) -> None:
    report = as_json(finished)
    assert report["missing"] == []
    seconds = {name: stage["seconds"] for name, stage in report["stages"].items()}
    assert seconds == {"models": 96.2, "prefixes": 6.4, "scores": 2.1, "train": 31.7, "eval": 8.9}
    assert all(stage["state"] == "complete" and stage["bytes"] > 0 for stage in report["stages"].values())
    assert report["stages"]["scores"]["rows"] == 1900  # arrays and table of one shard are one set of rows
    assert report["stages"]["train"]["rows"] == 100

    rows = tools["metric_rows"](100)
    training = report["training"]
    assert training["steps"] == training["planned_steps"] == 100
    for name in (
        "tokens_on_policy",
        "teacher_tokens_scored",
        "teacher_topk_tokens",
        "teacher_bytes_received",
    ):
        assert training[name] == sum(row[name] for row in rows)
    tokens = sum(row["tokens_on_policy"] + row["tokens_guidance"] for row in rows)
    outliers = sum(row["teacher_topk_tokens"] for row in rows)
    assert training["region_fraction"]["outlier"] == pytest.approx(outliers / tokens)
    assert sum(training["region_fraction"].values()) == pytest.approx(1)
    assert (report["cache"]["tokens"], report["cache"]["bytes_per_token"]) == (43210, 9.4)
    assert report["config"]["train"]["steps"] == 100
    assert report["config_sources"]["train.steps"] == "config.toml"
    assert report["config_sources"]["objective.partition.rule"] == "objective 'tropd'"
    assert "train.betas" not in report["config_sources"]
    assert {"python", "tropd", "torch", "transformers"} <= report["provenance"]["versions"].keys()
    assert report["provenance"]["inputs"]["train: teacher.weights"] == "ab" * 32
    assert set(report["provenance"]["fingerprints"]) == set(report["stages"])


def test_accuracies_are_those_of_the_files(finished: Workspace, tools: Tools) -> None:
    evaluation = as_json(finished)["evaluation"]
    right: dict[str, dict[str, bool]] = {}
    for who in ("before", "after", "teacher"):
        for mode in ("greedy", "sampled"):
            rows = [row for row in tools["evaluation_rows"](who) if row["mode"] == mode]
            found = evaluation[who][mode]
            assert found["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows))
            assert found["low"] < found["accuracy"] <= found["high"]
            assert (found["problems"], found["samples"], found["mean_tokens"]) == (120, 120, 20)
            assert found["truncated_fraction"] == pytest.approx(14 / 120)
            if mode == "sampled":
                right[who] = {row["prompt_id"]: row["correct"] for row in rows}
    gain = evaluation["gain"]["sampled"]
    before, after = right["before"], right["after"]
    assert gain["became_right"] == sum(after[p] and not before[p] for p in before)
    assert gain["became_wrong"] == sum(before[p] and not after[p] for p in before)
    assert gain["difference"] == pytest.approx((gain["became_right"] - gain["became_wrong"]) / 120)
    assert "Wilson" in evaluation["interval_method"]


def test_several_samples_are_grouped_by_problem(empty_workspace: Workspace, tools: Tools) -> None:
    row = tools["evaluation_rows"]("before", 1)[0]
    rows = [
        {**row, "prompt_id": problem, "sample_index": index, "correct": problem == "a" or index == 0}
        for problem in ("a", "b")
        for index in range(4)
    ]
    tools["write_evaluation"](empty_workspace.root, {"before": rows})
    found = as_json(empty_workspace)["evaluation"]["before"]["sampled"]
    assert found["accuracy"] == pytest.approx((1 + 0.25) / 2)
    assert (found["problems"], found["samples"]) == (2, 8)


def test_samples_show_every_outcome_with_its_prompt(finished: Workspace) -> None:
    samples = as_json(finished)["samples"]
    outcomes = {(s["before"]["correct"], s["after"]["correct"]) for s in samples}
    assert outcomes == {(False, True), (True, False), (True, True), (False, False)}
    assert all(s["prompt"].startswith("6+4*7-") and s["expected"] == "6" for s in samples)
    assert all(s["before"]["text"].startswith("6+4=0") for s in samples)


def test_long_responses_are_shortened(empty_workspace: Workspace, tools: Tools) -> None:
    parts = {who: tools["evaluation_rows"](who, 3) for who in ("before", "after")}
    parts["after"] = [{**row, "response": "a" * 100_000 + "end"} for row in parts["after"]]
    tools["write_evaluation"](empty_workspace.root, parts)
    text = as_json(empty_workspace)["samples"][0]["after"]["text"]
    assert len(text) < 5000
    assert text.endswith("end")
    assert "characters left out" in text


def test_an_empty_workspace(empty_workspace: Workspace) -> None:
    report = as_json(empty_workspace)
    assert report["training"] is None
    assert report["evaluation"]["before"] is None
    assert report["missing"] == [
        "models: prepare has not been run",
        "prefixes: generate-prefixes has not been run",
        "scores: score-teacher has not been run",
        "train: train has not been run",
        "eval: evaluate has not been run",
    ]


def test_an_unfinished_run_says_how_far_it_is(empty_workspace: Workspace, tools: Tools) -> None:
    root = empty_workspace.root
    tools["write_stage"](root, "train", {}, complete=False)
    tools["write_metrics"](root, tools["metric_rows"](40), '{"step": 41, "lo')
    tools["write_evaluation"](root, {"before": tools["evaluation_rows"]("before")}, complete=False)
    report = as_json(empty_workspace)
    assert "train: stage is not finished (step 40 of 100, none saved yet)" in report["missing"]
    assert "eval: stage is not finished (1 of 3 models)" in report["missing"]
    assert "eval: no sampled or greedy answers of the student after training" in report["missing"]
    assert report["training"]["steps"] == 40
    assert report["evaluation"]["before"]["greedy"]["problems"] == 120
    # Training without prefixes is what a purely on-policy run does: nothing is missing there.
    assert not any(line.startswith(("prefixes", "scores")) for line in report["missing"])


def test_values_that_are_not_finite_never_reach_the_json(finished: Workspace, tools: Tools) -> None:
    root = finished.root
    rows = tools["metric_rows"](30)
    rows[12]["grad_norm"] = math.nan
    tools["write_metrics"](root, rows)
    tools["write_stage"](
        root, "scores", {"part-00000.zarr": 1}, tokens=5, kept_mass=math.nan, deep=[math.inf]
    )
    report = as_json(finished)
    assert report["cache"]["kept_mass"] is None
    assert report["stages"]["scores"]["summary"]["deep"] == [None]
    assert report["training"]["series"]["grad_norm"][12] is None
    assert "train: grad_norm is not a finite number at step 12" in report["missing"]
    assert finite(build_report(finished).model_dump(mode="json"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def scramble(path: Path) -> None:
    """Same size, other bytes: only the checksum tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("eval/part-after.parquet", cut, "eval: part-after.parquet has"),
    ("eval/part-after.parquet", scramble, "eval: part-after.parquet has sha256"),
    ("eval/part-after.parquet", Path.unlink, "eval: part-after.parquet is missing"),
    ("eval/manifest.json", cut, "eval: manifest.json is not a readable manifest"),
    ("train/manifest.json", cut, "train: manifest.json is not a readable manifest"),
    ("train/manifest.json", lambda path: path.write_text("[]"), "train: manifest.json is not a readable"),
    ("train/metrics.jsonl", Path.unlink, "train: metrics.jsonl has no step"),
    (
        "train/samples.jsonl",
        Path.unlink,
        "train: samples.jsonl does not exist, so the acceptance map is missing",
    ),
    ("train/samples.jsonl", cut, "train: 1 unreadable line(s) in samples.jsonl are left out"),
    ("prefixes/part-00000.parquet", cut, "prefixes: part-00000.parquet has"),
    ("scores/part-00000.zarr", Path.unlink, "scores: part-00000.zarr is missing"),
    ("config.toml", cut, "config: config.toml"),
    ("config.toml", Path.unlink, "config: config.toml does not exist"),
    ("config.toml", lambda path: path.write_bytes(b"\xff\xfe"), "config: "),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damage_is_named_and_the_rest_is_reported(
    finished: Workspace, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(finished.root / name)
    report = as_json(finished)
    assert any(line.startswith(message) for line in report["missing"]), report["missing"]
    assert str(finished.root) not in json.dumps(report)
    assert report["evaluation"]["before"]["sampled"]["problems"] == 120
    if name.startswith("eval/part"):
        assert report["evaluation"]["after"]["sampled"] is None
        assert "eval: no sampled or greedy answers of the student after training" in report["missing"]


def test_a_file_with_other_columns_is_named(empty_workspace: Workspace, tools: Tools) -> None:
    tools["write_evaluation"](empty_workspace.root, {"before": [{"mode": "greedy", "prompt_id": "x"}]})
    assert "eval: part-before.parquet has no column correct" in as_json(empty_workspace)["missing"]


def test_ungraded_responses_are_left_out_and_counted(empty_workspace: Workspace, tools: Tools) -> None:
    rows = tools["evaluation_rows"]("before", 4)
    rows[0]["correct"] = None
    tools["write_evaluation"](empty_workspace.root, {"before": rows})
    report = as_json(empty_workspace)
    assert "eval: 1 response(s) of before have no grade and are left out" in report["missing"]
    assert report["evaluation"]["before"]["sampled"]["problems"] == 3


def test_equal_workspaces_give_equal_reports(finished: Workspace) -> None:
    assert build_report(finished) == build_report(finished)
