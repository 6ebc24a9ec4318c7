"""Several runs side by side: the results of each, from their reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tropd.pipeline.report.data.facts import Report, RunSummary

COMPARED = (
    "distance_reverse_kl",
    "distance_forward_kl",
    "accuracy_sampled",
    "accuracy_greedy",
    "reward_mean",
    "loss",
    "grad_norm",
    "k1_mean",
    "acceptance_mean",
    "region_fraction_outlier",
    "student_entropy",
    "response_length_mean",
    "prefix_length_mean",
)
"""Metrics that are drawn for all runs in one plot each."""


def summarize_runs(roots: Sequence[Path], reports: Sequence[Report]) -> list[RunSummary]:
    """One summary per run, in the order given."""
    return [_summarize(label, report) for label, report in zip(run_labels(roots), reports, strict=True)]


def run_labels(roots: Sequence[Path]) -> list[str]:
    """Shortest end of each folder's path that no other has."""
    parts = [root.resolve().parts for root in roots]
    labels = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        labels.append("/".join(own[-length:]))
    return labels


def measured_alike(runs: Sequence[RunSummary]) -> bool:
    """True if no two evaluated runs are known to have other problems, or another number of them."""
    files = {run.problems for run in runs if run.problems is not None}
    after = [run.evaluation.after for run in runs if run.evaluation.after is not None]
    prompts = {one.distance.prompts for one in after if one.distance is not None}
    sampled = {one.sampled.problems for one in after if one.sampled is not None}
    greedy = {one.greedy.problems for one in after if one.greedy is not None}
    return all(len(found) <= 1 for found in (files, prompts, sampled, greedy))


def _summarize(label: str, report: Report) -> RunSummary:
    config, training = report.config or {}, report.training
    series = training.series if training else {}
    return RunSummary(
        label=label,
        state=_state(report),
        objective=(config.get("objective") or {}).get("name") or _trained_objective(report),
        seed=(config.get("run") or {}).get("seed"),
        evaluation=report.evaluation,
        problems=report.provenance.inputs.get("eval: data.evaluation"),
        steps=training.steps if training else None,
        tokens_on_policy=training.tokens_on_policy if training else None,
        teacher_tokens_scored=training.teacher_tokens_scored if training else None,
        teacher_bytes_received=training.teacher_bytes_received if training else None,
        outlier_fraction=_outliers(report),
        seconds=report.stages["train"].seconds if "train" in report.stages else None,
        series={name: series[name] for name in ("step", *COMPARED) if name in series},
        missing=report.missing,
    )


def _state(report: Report) -> str:
    """The first thing that is not as in a finished run; stages that a run did without are not looked at."""
    damaged = [name for name, stage in report.stages.items() if stage.state == "damaged"]
    if damaged:
        return f"damaged: {', '.join(damaged)}"
    train, evaluation = report.stages.get("train"), report.stages.get("eval")
    if train is None or train.state == "not started":
        return "not trained"
    if train.state == "in progress":
        return f"step {train.done or 0:,}" + (f" of {train.total:,}" if train.total else "")
    if evaluation is None or evaluation.state != "complete":
        return "not evaluated"
    return "finished"


def _trained_objective(report: Report) -> str | None:
    """Value as training recorded it; the configuration may not be readable any more."""
    found = report.stages["train"].summary.get("objective") if "train" in report.stages else None
    return found if isinstance(found, str) else None


def _outliers(report: Report) -> float | None:
    """Share of the student's own tokens."""
    share = report.training.region_fraction if report.training else None
    if share is None or share.trust is None or share.outlier is None or share.trust + share.outlier <= 0:
        return None
    return share.outlier / (share.trust + share.outlier)
