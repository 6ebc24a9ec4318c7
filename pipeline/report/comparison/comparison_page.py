"""The comparison as one self-contained page."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tropd.pipeline.report.comparison.comparison import Comparison
from tropd.pipeline.report.comparison.comparison_distance import ReportedEstimate
from tropd.pipeline.report.plots import drawing
from tropd.pipeline.run.cells import FOLDER
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.workspace import Workspace

TITLES = {
    "distance_reverse_kl": ("Reverse KL on held-out prompts", "nats per token", False),
    "distance_forward_kl": ("Forward KL on held-out prompts", "nats per token", False),
    "accuracy_greedy": ("Accuracy during training, greedy", "right answers", True),
    "accuracy_sampled": ("Accuracy during training, sampled", "right answers", True),
    "grad_norm": ("Gradient norm, before clipping", "L2 norm", False),
    "k1_mean": ("K1 on student tokens", "nats per token", False),
    "region_fraction_outlier": ("Outliers", "share of tokens", True),
    "student_entropy": ("Student entropy", "nats per token", False),
    "response_length_mean": ("Response length, prefix included", "tokens", False),
    "teacher_tokens_scored": ("Tokens scored by the teacher", "tokens per step", False),
    "teacher_topk_tokens": ("Tokens with alternatives", "tokens per step", False),
    "teacher_bytes_received": ("Bytes from the teacher", "bytes per step", False),
}


def write_comparison(workspace: Workspace, comparison: Comparison) -> Path:
    """Write ``compare/comparison.json`` and ``compare/index.html``; returns the page's path."""
    folder = workspace.root / FOLDER
    write_text_atomic(folder / "comparison.json", comparison.model_dump_json(indent=1) + "\n")
    page = folder / "index.html"
    write_text_atomic(page, render_comparison(comparison))
    return page


def render_comparison(comparison: Comparison) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    outcome = [_outcome(comparison)] if any(m.accuracy for m in comparison.methods) else []
    environment.filters.update(
        percent=lambda value: f"{100 * value:.1f}\u00a0%",
        points=lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        count=lambda value: f"{value:,.0f}",
    )
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        css=Markup(_resource("page.css")),
        headline=_headline(comparison),
        plots=[*outcome, *(p for name in TITLES if (p := _curve(comparison, name)) is not None)],
    )


def _headline(comparison: Comparison) -> str:
    if not any(method.accuracy for method in comparison.methods):
        return _closest(comparison)
    best = max(comparison.methods, key=lambda m: m.accuracy["sampled"].mean)
    beside = ", ".join(
        f"{who} {100 * accuracy['sampled']:.1f} %"
        for who, accuracy in (("before", comparison.before), ("teacher", comparison.teacher))
        if accuracy
    )
    right = f"{100 * best.accuracy['sampled'].mean:.1f} %"
    return f"{best.objective} has the most sampled answers right: {right}" + (
        f" ({beside})." if beside else "."
    )


def _closest(comparison: Comparison) -> str:
    """The same of distances, where no problem has an answer."""
    measured = [method for method in comparison.methods if "reverse_kl" in method.distance]
    if not measured:
        return f"{len(comparison.methods)} methods"
    best = min(measured, key=lambda method: method.distance["reverse_kl"].mean)
    start = comparison.distance_before.get("reverse_kl")
    beside = f" (before {start.mean:.3f})" if start else ""
    found = best.distance["reverse_kl"].mean
    return f"{best.objective} comes closest to the teacher: reverse KL {found:.3f} nats per token{beside}."


def _outcome(comparison: Comparison) -> dict[str, Any]:
    """Accuracy per method with intervals, both modes."""
    methods = comparison.methods
    with drawing.style("outcome"):
        figure, axes = drawing.new_axes(height=1.0 + 0.32 * len(methods))
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=drawing.GRID, linewidth=0.8)
        for mode, color, shift in (("sampled", drawing.BLUE, 0.14), ("greedy", drawing.GREEN, -0.14)):
            for row, method in enumerate(reversed(methods)):
                found: ReportedEstimate = method.accuracy[mode]
                y = row + shift
                axes.plot([found.low, found.high], [y, y], color=color, linewidth=2.4, alpha=0.45)
                axes.plot([found.mean], [y], "o", color=color, markersize=5, label=mode if row == 0 else None)
        axes.set_yticks(range(len(methods)), [m.objective for m in reversed(methods)])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("problems answered right, with 95 % interval over seeds and problems")
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)
        svg = drawing.inline_svg(drawing.to_svg(figure), "outcome", "Accuracy per method")
    return {"name": "outcome", "title": "Accuracy after training", "svg": Markup(svg)}


def _curve(comparison: Comparison, name: str) -> dict[str, Any] | None:
    title, ylabel, percent = TITLES[name]
    if all(v is None for m in comparison.methods for v in m.curves[name]):
        return None
    with drawing.style(name):
        figure, axes = drawing.new_axes(height=3.1)
        for index, method in enumerate(comparison.methods):
            values = np.array([np.nan if v is None else v for v in method.curves[name]], dtype=np.float64)
            known = ~np.isnan(values)
            shown = values[known]
            if len(shown) > 24:
                shown = drawing.moving_average(shown, max(5, len(shown) // 15))
            line = drawing.look(index).arguments
            axes.plot(np.flatnonzero(known), shown, label=method.objective, linewidth=1.4, **line)
        drawing.finish(
            figure, axes, xlabel="step", ylabel=ylabel, percent=percent, from_zero=name != "k1_mean"
        )
        svg = drawing.inline_svg(drawing.to_svg(figure), name, title)
    return {"name": name, "title": title, "svg": Markup(svg)}


def _resource(name: str) -> str:
    return (resources.files("tropd.pipeline.report.page") / name).read_text(encoding="utf-8")
