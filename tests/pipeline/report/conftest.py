"""A synthetic workspace with plausible contents, written through the storage layer as the stages do it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tropd.pipeline.training.record.acceptance_samples import sampled_steps
from tropd.storage.catalog import EVALUATIONS
from tropd.storage.formats.samples_file import Alternative, SampledResponse, StepSample, StudentToken
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.manifest import Manifest, describe_shard, write_manifest
from tropd.storage.workspace import Workspace

sys.path.insert(0, str(Path(__file__).parent))
CONFIG = """
[run]
recipe = "demo"
seed = 3
[rollout]
max_tokens = 36
[objective]
name = "tropd"
k = 5
[scores]
k = 5
[train]
steps = 100
learning_rate = 3e-4
[demo]
enabled = true
"""
ACCURACIES = {"before": (0.40, 0.99), "after": (0.71, 1.0), "teacher": (0.99, 1.0)}
SECONDS = {"models": 96.2, "prefixes": 6.4, "scores": 2.1, "train": 31.7, "eval": 8.9}


def metric_rows(steps: int) -> list[dict[str, Any]]:
    """Curves of a run that went well."""
    noise = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        share = step / 100
        outliers = 0.22 * math.exp(-2 * share) + 0.01 * float(noise.random())
        guidance_tokens = int(400 * max(0.0, math.cos(share * math.pi / 2)))
        student_tokens = 900 - guidance_tokens + int(noise.integers(60))
        tokens = guidance_tokens + student_tokens
        topk = round(outliers * student_tokens)
        row: dict[str, Any] = {
            "step": step,
            "loss": 0.2 * math.exp(-share) + 0.05 * float(noise.normal()),
            "loss_trust": -0.03 + 0.02 * float(noise.normal()),
            "loss_outlier": 0.2 * math.exp(-2 * share) + 0.02 * float(noise.normal()),
            "loss_guidance": 0.0004 * guidance_tokens / tokens * (1 + 0.1 * float(noise.normal())),
            "grad_norm": 1.5 + 0.6 * float(abs(noise.normal())),
            "learning_rate": 3e-4 * min(1.0, (step + 1) / 5),
            "region_fraction_guidance": guidance_tokens / tokens,
            "region_fraction_outlier": topk / tokens,
            "region_fraction_trust": (student_tokens - topk) / tokens,
            "tokens_on_policy": student_tokens,
            "tokens_guidance": guidance_tokens,
            "teacher_tokens_scored": student_tokens,
            "teacher_topk_tokens": topk,
            "teacher_bytes_received": 5 * student_tokens + 44 * topk,
            "teacher_bytes_sent": 9 * student_tokens,
            "k1_mean": 0.5 * math.exp(-2 * share) + 0.03 * float(noise.normal()),
            "k1_max": 9 + float(noise.normal()),
            "k1_min": -2 + 0.3 * float(noise.normal()),
            "acceptance_mean": 1 - outliers,
            "student_entropy": 0.35 * math.exp(-1.5 * share) + 0.02,
            "prefix_length_scheduled": round(18 * (1 + math.cos(math.pi * share))),
            "prefix_length_mean": round(14 * (1 + math.cos(math.pi * share)) * 0.8, 2),
            "response_length_mean": tokens / 32,
            "truncated_fraction": 0.02 * float(noise.random()),
            "time_rollout": 0.12 + 0.01 * float(noise.random()),
            "time_score": 0.05 + 0.01 * float(noise.random()),
            "time_train": 0.11 + 0.01 * float(noise.random()),
            "time_total": 0.31,
            "time_queue": 0.02,
            "exchange_seconds": [0.02, 0.05],
            "memory_peak_rollout": 21e9,
            "memory_peak_score": 17e9,
            "memory_peak_train": 33e9,
            "mfu_train": 0.38 + 0.0001 * step,
            "acceptance_histogram": [1, 2, 30],
            "teacher_entropy": None,
            "clip_fraction": float(noise.random()),
        }
        if (step + 1) % 20 == 0:
            row["distance_prompts"] = 64
            row["distance_reverse_kl"] = 0.6 * math.exp(-2 * share)
            row["distance_forward_kl"] = 0.4 * math.exp(-2 * share)
            row["distance_acceptance"] = 1 - 0.4 * math.exp(-2 * share)
            row["distance_length"] = 26 + 8 * math.exp(-share)
            row["distance_teacher_length"] = 26.4
            row["accuracy_problems"] = 100
            row["accuracy_greedy"] = min(1.0, 0.97 + 0.0003 * step)
            row["accuracy_sampled"] = 0.42 + 0.3 * (1 - math.exp(-3 * share))
        rows.append(row)
    return rows


def write_metrics(root: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    (root / "train").mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "train" / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def step_sample(step: int, texts: Sequence[str] = ("1+", "2", "=", "é", "\n", "3")) -> StepSample:
    """Two responses: one after a prefix, with one outlier that the teacher was asked about; one without any token."""
    outlier = 2
    tokens = [
        StudentToken(
            text=text,
            trust=float(i != outlier),
            outlier=float(i == outlier),
            student_logprob=-0.25,
            teacher_logprob=None if i == outlier else -0.5 - 0.1 * step / (i + 1),
            p_trust=0.0 if i == outlier else math.exp(-0.25 - 0.1 * step / (i + 1)),
            alternatives=[
                Alternative(text="+", probability=0.75),
                Alternative(text=texts[0], probability=0.125),
            ]
            if i == outlier
            else [],
        )
        for i, text in enumerate(texts)
    ]
    plain = {"prompt": "6+4*7=", "guidance_tokens": 300, "student_tokens": 500, "truncated": True}
    return StepSample(
        step=step,
        responses=[
            SampledResponse(prompt_id="train-1", guidance=["7", "*"], tokens=tokens, **plain),
            SampledResponse(prompt_id="train-2", guidance=["4"], tokens=[], **plain),
        ],
    )


def write_samples(root: Path, samples: Sequence[StepSample], tail: str = "") -> None:
    (root / "train").mkdir(exist_ok=True)
    text = "".join(sample.model_dump_json() + "\n" for sample in samples)
    (root / "train" / "samples.jsonl").write_text(text + tail, encoding="utf-8")


def write_stage(
    root: Path, name: str, shards: dict[str, int], *, complete: bool = True, **summary: Any
) -> None:
    """A manifest over files that are there already, or are made here with some bytes."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    for shard in shards:
        if not (folder / shard).exists():
            (folder / shard).write_bytes(b"x" * 1000)
    fields = {"train.steps": 100, "teacher.weights": "ab" * 32, "upstream": "cd" * 32}
    manifest = Manifest.start(name, Fingerprint(fields)).model_copy(
        update={
            "shards": {shard: describe_shard(folder, shard, rows) for shard, rows in shards.items()},
            "complete": complete,
            "summary": summary if complete else {},
        }
    )
    write_manifest(folder, manifest)


def evaluation_rows(who: str, problems: int = 120) -> list[dict[str, Any]]:
    noise = np.random.default_rng(len(who))
    sampled, greedy = ACCURACIES[who]
    rows: list[dict[str, Any]] = []
    for problem in range(problems):
        for mode, accuracy in (("sampled", sampled), ("greedy", greedy)):
            right = bool(noise.random() < accuracy)
            response = f"6+4=0;0*7=0;0-{problem % 10}=6;#{6 if right else 3}"
            rows.append(
                {
                    "who": who,
                    "mode": mode,
                    "prompt_id": f"eval-{problem}",
                    "sample_index": 0,
                    "response": response,
                    "answer": "6" if right else "3",
                    "expected": "6",
                    "correct": right,
                    "num_tokens": 20,
                    "finish_reason": "stop" if problem % 9 else "length",
                }
            )
    return rows


def distance(reverse: float | None, forward: float | None, acceptance: float | None) -> dict[str, Any]:
    """What the stage's summary says of one model."""

    def interval(mean: float | None, width: float) -> dict[str, float] | None:
        return None if mean is None else {"mean": mean, "low": mean - width, "high": mean + width}

    return {
        "reverse_kl": interval(reverse, 0.01),
        "forward_kl": interval(forward, 0.01),
        "acceptance": interval(acceptance, 0.01),
        "length": interval(26.4, 1.5),
        "truncated": interval(0.0, 0.0),
        "entropy": interval(0.3, 0.1),
        "prompts": 64,
        "method": "exact",
    }


DISTANCES = {
    "before": distance(0.603, 0.444, 0.61),
    "after": distance(0.128, 0.104, 0.93),
    "teacher": distance(None, None, None),
}


def write_evaluation(
    root: Path, parts: dict[str, list[dict[str, Any]]], *, complete: bool = True, **summary: Any
) -> None:
    (root / "eval").mkdir(exist_ok=True)
    for who, rows in parts.items():
        table = pa.Table.from_pylist(rows, schema=None if rows else EVALUATIONS)
        pq.write_table(table, root / "eval" / f"part-{who}.parquet")
    shards = {f"part-{who}.parquet": len(rows) for who, rows in parts.items()}
    write_stage(root, "eval", shards, complete=complete, **summary)


@pytest.fixture
def empty_workspace(tmp_path: Path) -> Workspace:
    """Only what ``tropd init`` leaves."""
    workspace = Workspace.create(tmp_path / "run")
    workspace.config_path.write_text(CONFIG, encoding="utf-8")
    return workspace


def fill(workspace: Workspace, steps: int = 100) -> None:
    """Everything that a finished run leaves."""
    root = workspace.root
    workspace.config_path.write_text(CONFIG, encoding="utf-8")
    (root / "data").mkdir()
    problems = [{"id": f"eval-{i}", "prompt": f"6+4*7-{i % 10}=", "answer": "6"} for i in range(120)]
    (root / "data" / "eval.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    write_stage(root, "models", {"teacher": 1, "student": 1})
    write_stage(
        root,
        "prefixes",
        {"part-00000.parquet": 1900},
        trajectories=1900,
        tokens=43210,
        prompts=2000,
        kept_fraction=0.95,
        mean_length=22.7,
    )
    write_stage(
        root,
        "scores",
        {"part-00000.zarr": 1900, "part-00000.parquet": 1900},
        tokens=43210,
        bytes_per_token=9.4,
        alternatives_per_token=1.31,
        kept_mass=0.9994,
    )
    write_metrics(root, metric_rows(steps))
    write_samples(root, [step_sample(step) for step in sampled_steps(steps)])
    write_stage(root, "train", {"final": 1}, steps=steps, final_loss=0.07, objective="tropd")
    write_evaluation(root, {who: evaluation_rows(who) for who in ACCURACIES}, distance=DISTANCES)
    (root / "logs").mkdir()
    lines = [json.dumps({"stage": name, "seconds": value}) for name, value in SECONDS.items()]
    (root / "logs" / "stages.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def finished(empty_workspace: Workspace) -> Workspace:
    fill(empty_workspace)
    return empty_workspace


@pytest.fixture(scope="session")
def tools() -> dict[str, Callable[..., Any]]:
    """The writers above, for tests that build something else."""
    return {
        "metric_rows": metric_rows,
        "write_metrics": write_metrics,
        "step_sample": step_sample,
        "write_samples": write_samples,
        "fill": fill,
        "write_stage": write_stage,
        "evaluation_rows": evaluation_rows,
        "write_evaluation": write_evaluation,
        "DISTANCES": DISTANCES,
    }
