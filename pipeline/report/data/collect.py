"""Gather everything that a workspace's files say about its run into one ``Report``.

Works on any workspace, however unfinished or damaged: existing parts are reported, missing ones named in
``Report.missing``. Computes no new results and loads no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tropd.pipeline.config.explain import explain
from tropd.pipeline.config.resolve import ResolvedConfig, config_text, parse_config
from tropd.pipeline.config.schema import to_plain
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.report.data.acceptance import summarize_samples
from tropd.pipeline.report.data.distances import read_distances
from tropd.pipeline.report.data.evaluations import MODES, EvaluationFiles, pick_samples, summarize_evaluation
from tropd.pipeline.report.data.facts import Cache, Distance, Evaluation, Report, StageReport, Training
from tropd.pipeline.report.data.provenance import describe_provenance
from tropd.pipeline.report.data.runs import summarize_runs
from tropd.pipeline.report.data.training_metrics import read_metrics, summarize_training
from tropd.pipeline.report.status import StageStatus, workspace_status
from tropd.pipeline.report.verdicts.headline import headline
from tropd.pipeline.report.verdicts.verdicts import find_verdicts
from tropd.storage.errors import TropdError
from tropd.storage.formats.samples_file import StepSample, read_samples
from tropd.storage.formats.step_log import spans, steps_with_samples
from tropd.storage.stage.fingerprint import flatten
from tropd.storage.stage.manifest import Manifest, read_manifest, trained_steps
from tropd.storage.workspace import EVALUATED, METRICS, SAMPLES, Workspace

_DECIDES: Mapping[str, str | tuple[str, ...]] = {
    "scores": "scores.",
    "train": ("train.", "objective."),
    "eval": "evaluation.",
}
"""Sections whose values are those of a stage's manifest."""


def build_report(workspace: Workspace, others: Sequence[Workspace] = ()) -> Report:
    """Everything that is known about the run in ``workspace``, and a summary of the ``others`` beside it."""
    report = _build_report(workspace)
    beside = {
        other.root.resolve(): other for other in others if other.root.resolve() != workspace.root.resolve()
    }
    if not beside:
        return report
    runs = summarize_runs(
        [workspace.root, *beside], [report, *(_build_report(other) for other in beside.values())]
    )
    return report.model_copy(update={"runs": runs})


def _build_report(workspace: Workspace) -> Report:
    missing: list[str] = []
    resolved = _read_config(workspace, missing)
    stages = [stage for stage in workspace_status(workspace).stages if stage.name != "report"]
    manifests = _read_manifests(workspace, stages)
    trained = trained_steps(manifests["train"]) if "train" in manifests else 0
    rows, metric_problems = read_metrics(workspace.stage("train") / METRICS, trained)
    training = summarize_training(
        rows,
        planned_steps=resolved.config.train.steps if resolved else None,
        stage_seconds=next((stage.seconds for stage in stages if stage.name == "train"), None),
    )
    files = EvaluationFiles(workspace.stage("eval"))
    prompts = _prompt_texts(workspace, resolved)
    evaluation = summarize_evaluation(files, prompts, _distances(manifests))
    samples = pick_samples(files, prompts)
    cache = _cache(manifests)
    acceptance_map, sample_problems = _read_samples(workspace, training, manifests.get("train"))

    for stage in (stage for stage in stages if stage.needed):
        missing += _missing_of_stage(stage, files.problems)
    missing += [*metric_problems, *sample_problems, *dict.fromkeys(files.problems)]
    missing += _missing_results(stages, training, trained, evaluation)
    return Report(
        workspace=workspace.root.name,
        headline=headline(evaluation),
        verdicts=find_verdicts(evaluation, training, cache, _settings(resolved, manifests)),
        stages={stage.name: _stage_report(stage, manifests.get(stage.name)) for stage in stages},
        evaluation=evaluation,
        training=training,
        cache=cache,
        samples=samples,
        acceptance=summarize_samples(acceptance_map),
        acceptance_map=acceptance_map,
        config=to_plain(resolved.config) if resolved else None,
        config_sources=_given_values(resolved) if resolved else {},
        provenance=describe_provenance(manifests),
        missing=missing,
    )


def _read_config(workspace: Workspace, missing: list[str]) -> ResolvedConfig | None:
    path = workspace.config_path
    try:
        if path.exists():
            return parse_config(config_text(path, path.name), where=path.name)
        missing.append(f"config: {path.name} does not exist")
    except (TropdError, OSError, ValueError) as error:
        missing.append(f"config: {error}")
    return None


def _settings(resolved: ResolvedConfig | None, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Values by dotted path: those of the configuration, or where a stage has run with others, these."""
    settings: dict[str, Any] = flatten("", to_plain(resolved.config)) if resolved else {}
    for name, sections in _DECIDES.items():
        fields = manifests[name].fields if name in manifests else {}
        settings |= {path: value for path, value in fields.items() if path.startswith(sections)}
    return settings


def _read_samples(
    workspace: Workspace, training: Training | None, manifest: Manifest | None
) -> tuple[list[StepSample], list[str]]:
    """Sampled steps, and the problems of their file."""
    try:
        samples, unreadable = read_samples(workspace.stage("train") / SAMPLES)
    except OSError as error:
        return [], [f"train: {SAMPLES} cannot be read ({error.strerror})"]
    if unreadable:
        return samples, [f"train: {unreadable} unreadable line(s) in {SAMPLES} are left out"]
    if training is not None and not samples:
        return samples, [f"train: {SAMPLES} does not exist, so the acceptance map is missing"]
    there = {sample.step for sample in samples}
    missing = [step for step in steps_with_samples(manifest) if step not in there] if manifest else []
    return samples, [f"train: {SAMPLES} has no record of step {spans(missing)}"] if missing else []


def _given_values(resolved: ResolvedConfig) -> dict[str, str]:
    """Sources of the fields that were given somewhere, by dotted path."""
    return {field.path: field.source for field in explain(resolved, "") if field.source != "default"}


def _read_manifests(workspace: Workspace, stages: list[StageStatus]) -> dict[str, Manifest]:
    manifests: dict[str, Manifest] = {}
    for stage in stages:
        try:
            manifest = read_manifest(workspace.stage(stage.name))
        except (TropdError, OSError):
            continue  # its status says so
        if manifest is not None:
            manifests[stage.name] = manifest
    return manifests


def _stage_report(stage: StageStatus, manifest: Manifest | None) -> StageReport:
    return StageReport(
        command=stage.command,
        state=stage.state,
        done=stage.done,
        total=stage.total,
        unit=stage.unit,
        rows=stage.rows,
        bytes=stage.bytes,
        seconds=stage.seconds,
        fingerprint=stage.fingerprint,
        summary=_finite(manifest.summary) if manifest else {},
    )


def _cache(manifests: Mapping[str, Manifest]) -> Cache:
    scores = manifests["scores"].summary if "scores" in manifests else {}
    prefixes = manifests["prefixes"].summary if "prefixes" in manifests else {}
    return Cache(
        tokens=_whole(scores, "tokens"),
        bytes_per_token=_number(scores, "bytes_per_token"),
        alternatives_per_token=_number(scores, "alternatives_per_token"),
        kept_mass=_number(scores, "kept_mass"),
        trajectories=_whole(prefixes, "trajectories"),
        mean_length=_number(prefixes, "mean_length"),
        kept_fraction=_number(prefixes, "kept_fraction"),
    )


def _distances(manifests: Mapping[str, Manifest]) -> dict[str, Distance]:
    return read_distances(manifests["eval"].summary) if "eval" in manifests else {}


def _number(summary: Mapping[str, Any], name: str) -> float | None:
    value = summary.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have, wherever they are nested."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _whole(summary: Mapping[str, Any], name: str) -> int | None:
    value = summary.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _prompt_texts(workspace: Workspace, resolved: ResolvedConfig | None) -> dict[str, str]:
    """Texts of the evaluation problems by id; without them responses are shown alone."""
    if resolved is None:
        return {}
    data = resolved.config.data
    try:
        return {p.id: p.text for p in scan_prompts(workspace.resolve(data.evaluation), data)[0]}
    except (TropdError, OSError):
        return {}


def _missing_of_stage(stage: StageStatus, told: list[str]) -> list[str]:
    if stage.state == "not started":
        return [f"{stage.name}: {stage.command} has not been run"]
    if stage.state == "in progress":
        progress = f" ({stage.progress_text})" if stage.progress_text else ""
        return [f"{stage.name}: stage is not finished{progress}"]
    if stage.state == "damaged" and not any(line.startswith(f"{stage.name}:") for line in told):
        return [f"{stage.name}: {stage.problem}"]
    return []


def _missing_results(
    stages: list[StageStatus], training: Training | None, trained: int, evaluation: Evaluation
) -> list[str]:
    """Results that a stage promises and does not have; stages that were not run are named already."""
    states = {stage.name: stage.state for stage in stages}
    lines: list[str] = []
    if training is None and (trained or states.get("train") in ("complete", "damaged")):
        lines.append(f"train: {METRICS} has no step, so the curves are missing")
    if states.get("eval") != "not started":
        for who in EVALUATED if evaluation.graded or not evaluation.compared else ():
            modes = [mode for mode in MODES if evaluation.accuracy(who, mode) is None]
            if modes:
                subject = who if who == "teacher" else f"the student {who} training"
                lines.append(f"eval: no {' or '.join(modes)} answers of {subject}")
    return lines
