"""The report as one self-contained HTML page: no network, no font from elsewhere.

Its one script is allowed by its hash, so that no other can run whatever a model has written.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from tropd.pipeline.report.data.acceptance import show_samples
from tropd.pipeline.report.data.benchmarks import benchmark_rows
from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.data.distances import NAMES, distance_note, distance_rows
from tropd.pipeline.report.data.facts import Evaluation, Report
from tropd.pipeline.report.data.runs import measured_alike
from tropd.pipeline.report.page.formats import count, duration, human_bytes, percent, points, show_controls
from tropd.pipeline.report.plots import drawing
from tropd.pipeline.report.plots.drawing import Plot
from tropd.pipeline.report.plots.plots import WHO_COLORS, draw_report
from tropd.pipeline.training.record.acceptance_samples import MAX_GUIDANCE, MAX_TOKENS
from tropd.storage.disk.atomic import atomic_directory, write_text_atomic
from tropd.storage.stage.fingerprint import flatten
from tropd.storage.workspace import Mode, Workspace

_STEP_PARTS = {
    "rollout": "sampling responses",
    "score": "waiting for the teacher",
    "wait": "waiting for responses and scores",
    "train": "forward and backward",
    "optimizer": "optimizer",
    "sync": "weights to the sampler",
}


def write_report(workspace: Workspace, others: Sequence[Workspace] = ()) -> Path:
    """Build the report and write its page; with ``others`` it also has their runs beside that of ``workspace``."""
    return write_page(workspace, build_report(workspace, others))


def write_page(workspace: Workspace, report: Report) -> Path:
    """Write ``report/index.html``, ``report/report.json`` and ``report/plots``; returns the page's path.

    Each file is replaced atomically, the page last.
    """
    plots = draw_report(report)
    folder = workspace.stage("report")
    with atomic_directory(folder / "plots") as temporary:
        for plot in plots:
            (temporary / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            (temporary / f"{plot.name}.png").write_bytes(plot.png)
    write_text_atomic(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    page = folder / "index.html"
    write_text_atomic(page, render_page(report, plots))
    return page


def render_page(report: Report, plots: list[Plot]) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        count=count,
        bytes=human_bytes,
        duration=duration,
        points=points,
        subscripts=_subscripts,
        code=_code,
    )
    groups: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("outcome", "distance", "runs", "main", "time", "more")
    }
    for plot in plots:
        card = {"title": plot.title, "caption": _subscripts(plot.caption), "healthy": plot.healthy}
        groups[plot.group].append({**card, "name": plot.name, "svg": Markup(plot.inline)})
    script = _resource("page.js") if report.acceptance_map else ""
    benchmarks = benchmark_rows(report)
    html = environment.get_template("page.html.j2").render(
        report=report,
        css=Markup(_resource("page.css")),
        subtitle=_subtitle(report),
        benchmarks=benchmarks,
        paper=any(row.paper is not None for row in benchmarks),
        contenders=_contenders(report.evaluation) if report.evaluation.graded else [],
        distances=distance_rows(report.evaluation),
        distance_note=distance_note(report.evaluation),
        figures=_key_figures(report),
        plots=groups,
        times=_times(report),
        phases=report.training.phases if report.training else [],
        phase_names=_STEP_PARTS,
        cache=_cache_rows(report),
        config=_config_rows(report),
        runs=_run_rows(report),
        alike=measured_alike(report.runs),
        acceptance=show_samples(report.acceptance_map),
        first_step=_first_written(report),
        max_tokens=MAX_TOKENS,
        max_guidance=MAX_GUIDANCE,
        script=Markup(script),
        script_hash=_hash(script),
    )
    return show_controls(html)


def _hash(script: str) -> str:
    """Hash of a script, in the form of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _subtitle(report: Report) -> list[str]:
    """The run in a few words."""
    parts = [report.workspace]
    if report.config:
        run, objective = report.config["run"], report.config["objective"]
        if run["recipe"] and run["recipe"] != report.workspace:
            parts.append(f"recipe {run['recipe']}")
        parts += [f"objective {objective['name']}", f"seed {run['seed']}"]
    if report.training:
        parts.append(_amount(report.training.steps, "steps"))
    return parts


def _contenders(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "who": who,
            "name": NAMES[who],
            "sampled": evaluation.accuracy(who, "sampled"),  # type: ignore[arg-type]
            "greedy": evaluation.accuracy(who, "greedy"),  # type: ignore[arg-type]
        }
        for who in WHO_COLORS
        if getattr(evaluation, who) is not None
    ]


def _key_figures(report: Report) -> list[tuple[str, str, str]]:
    """(value, meaning, detail) of the most important numbers."""
    figures: list[tuple[str, str, str]] = []
    before, after = report.evaluation.distance("before"), report.evaluation.distance("after")
    if after and after.reverse_kl:
        detail = f"{before.reverse_kl.mean:.3g} before training" if before and before.reverse_kl else ""
        figures.append((f"{after.reverse_kl.mean:.3g}", "reverse KL, nats per token", detail))
    modes: tuple[Mode, ...] = ("sampled", "greedy")
    for mode in modes:
        gain = getattr(report.evaluation.gain, mode)
        if gain:
            interval = f"95\u00a0% interval {points(gain.low)} to\u00a0{points(gain.high)}"
            figures.append((points(gain.difference), f"points gained, {mode}", interval))
    training = report.training
    if training:
        share = training.region_fraction
        # By rewards alone, without a log-prob of the teacher's, no token is trusted or rejected.
        known = any(value is not None for value in training.series.get("acceptance_mean", ()))
        if (
            known
            and share.trust is not None
            and share.outlier is not None
            and share.trust + share.outlier > 0
        ):
            trusted = share.trust / (share.trust + share.outlier)
            figures.append((percent(trusted), "student tokens trusted", "over the whole run"))
        if training.tokens_on_policy is not None:
            scored = training.teacher_tokens_scored
            detail = "" if scored is None else f"{count(scored)} scored by the teacher"
            figures.append((count(training.tokens_on_policy), "on-policy tokens", detail))
        if training.teacher_bytes_received is not None:
            detail = ""
            if training.teacher_tokens_scored:
                each = training.teacher_bytes_received / training.teacher_tokens_scored
                detail = f"{each:.1f} bytes per scored token"
            figures.append((human_bytes(training.teacher_bytes_received), "from the teacher", detail))
    seconds = [stage.seconds for stage in report.stages.values() if stage.seconds is not None]
    if seconds:
        figures.append((duration(sum(seconds)), "for all stages", ""))
    return figures


def _run_rows(report: Report) -> list[dict[str, Any]]:
    """Several runs, each with the look of its curves."""
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(report.runs):
        look = drawing.look(number)
        shown = {
            "number": number,
            "color": drawing.VARIABLES[look.color],
            "dashes": " ".join(f"{2.4 * length:g}" for length in look.dashes),
            "sampled": run.evaluation.accuracy("after", "sampled"),
            "greedy": run.evaluation.accuracy("after", "greedy"),
            "gain": run.evaluation.gain.sampled,
            "distance": run.evaluation.distance("after"),
        }
        rows.append({**run.model_dump(exclude={"evaluation", "series"}), **shown})
    return rows


def _first_written(report: Report) -> int:
    """Number of the first sampled step in which the student has written something, if there is one."""
    return next((n for n, step in enumerate(report.acceptance) if step.student_tokens), 0)


def _times(report: Report) -> list[dict[str, Any]]:
    """Rows of the time table; shares are of all stages, and of its sum for the parts of training."""
    total = sum(stage.seconds or 0.0 for stage in report.stages.values())
    rows: list[dict[str, Any]] = []
    for name, stage in report.stages.items():
        progress = _amount(stage.done, stage.unit) if stage.done is not None else ""
        share = stage.seconds / total if stage.seconds is not None and total else None
        row = {"name": stage.command, "state": stage.state, "done": progress, "inner": False}
        rows.append({**row, "bytes": stage.bytes, "seconds": stage.seconds, "share": share})
        if name == "train" and report.training and report.training.seconds:
            steps = sum(report.training.seconds.values())
            for part, seconds in report.training.seconds.items():
                share = seconds / steps if steps else None
                row = {
                    "name": _STEP_PARTS.get(part, "start, evaluation, saving"),
                    "state": "",
                    "done": "",
                    "inner": True,
                }
                rows.append({**row, "bytes": None, "seconds": seconds, "share": share})
    return rows


def _amount(number: int, unit: str) -> str:
    return f"{count(number)} {unit.removesuffix('s') if number == 1 else unit}"


def _cache_rows(report: Report) -> list[tuple[str, str, str]]:
    cache = report.cache
    rows: list[tuple[str, str | None, str]] = [
        ("Trajectories", _or_none(cache.trajectories, count), "responses of the teacher that are kept"),
        ("Kept", _or_none(cache.kept_fraction, percent), "share of those generated"),
        ("Mean length", _or_none(cache.mean_length, lambda v: f"{v:.1f}"), "tokens per trajectory"),
        ("Tokens", _or_none(cache.tokens, count), "scored by the teacher once, before training"),
        (
            "Alternatives",
            _or_none(cache.alternatives_per_token, lambda v: f"{v:.2f}"),
            "per token: as many as reach the configured mass",
        ),
        ("Kept mass", _or_none(cache.kept_mass, lambda v: f"{100 * v:.3f} %"), "mean probability on them"),
        ("Bytes per token", _or_none(cache.bytes_per_token, lambda v: f"{v:.1f}"), "on disk, compressed"),
    ]
    return [(name, value, what) for name, value, what in rows if value is not None]


def _or_none(value: Any, form: Any) -> str | None:
    return None if value is None else str(form(value))


def _config_rows(report: Report) -> dict[str, list[dict[str, str]]]:
    """Resolved fields by section."""
    sections: dict[str, list[dict[str, str]]] = {}
    for path, value in flatten("", report.config or {}).items():
        section, _, field = path.partition(".")
        shown = "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        source = report.config_sources.get(path, "")
        sections.setdefault(section, []).append({"field": field, "value": shown, "source": source})
    return sections


def _subscripts(text: str) -> Markup:
    """π_T and the like with subscripts; everything else is escaped."""
    return Markup(re.sub(r"(π|P)_(\w+)", r"\1<sub>\2</sub>", str(escape(text))))


def _code(text: str) -> Markup:
    """Text in backticks as code; everything is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _resource(name: str) -> str:
    return (resources.files("tropd.pipeline.report.page") / name).read_text(encoding="utf-8")
