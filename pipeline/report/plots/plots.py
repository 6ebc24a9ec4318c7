"""The plots of a report: the outcome, every described curve, and metrics that nobody described.

The latter are drawn under their own names, for a section of the page that is folded.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tropd.pipeline.report.data.facts import Evaluation, Report, Training
from tropd.pipeline.report.data.phases import EXCHANGES
from tropd.pipeline.report.plots import drawing
from tropd.pipeline.report.plots.curves import CURVES, Curve, Line
from tropd.pipeline.report.plots.drawing import BLUE, GREY, PURPLE, Numbers, Plot
from tropd.pipeline.report.plots.run_plots import draw_runs
from tropd.storage.workspace import Mode

WHO_COLORS = {"before": GREY, "after": BLUE, "teacher": PURPLE}
_EXPECTED_ELSEWHERE = {
    "step",
    "time_total",
    "time_optimizer",
    "time_sync",
    "time_checkpoint",
    "time_queue",
}
# Numbers of prompts and problems, which do not change.
_EXPECTED_ELSEWHERE |= {"distance_prompts", "accuracy_problems"}


def draw_report(report: Report) -> list[Plot]:
    """Every plot that has data, in the order of the page."""
    plots: list[Plot] = []
    if report.evaluation.graded:
        plots.append(_draw_outcome(report.evaluation))
    if report.training is not None:
        clip = ((report.config or {}).get("train") or {}).get("max_grad_norm")
        for curve in (*CURVES, *_unknown(report.training)):
            plot = _draw_curve(curve, report.training, clip if curve.name == "grad_norm" else None)
            if plot is not None:
                plots.append(plot)
    return [*plots, *draw_runs(report.runs)]


def _unknown(training: Training) -> list[Curve]:
    """Metrics that nobody described: drawn under their own names."""
    described = {line.metric for curve in CURVES for line in curve.lines} | _EXPECTED_ELSEWHERE
    return [
        Curve(f"metric-{number}", name, (Line(name, name),), "", "", "", group="more")
        for number, name in enumerate(sorted(training.series.keys() - described))
        if not name.startswith(EXCHANGES)
    ]


def _draw_curve(curve: Curve, training: Training, clip: float | None) -> Plot | None:
    steps = _column(training, "step")
    columns = [
        (line, _column(training, line.metric)) for line in curve.lines if line.metric in training.series
    ]
    columns = [(line, values) for line, values in columns if not np.isnan(values).all()]
    if not columns:
        return None
    with drawing.style(curve.name):
        figure, axes = drawing.new_axes()
        for line, values in columns:
            drawing.draw_line(axes, steps, values, label=line.label, color=line.color, smooth=line.smooth)
        if clip is not None and np.nanmax(columns[0][1]) > clip / 2:
            axes.axhline(clip, color=drawing.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(*_limits(steps))  # the same for all curves, so that they can be read side by side
        drawing.finish(
            figure,
            axes,
            xlabel="step",
            ylabel=curve.ylabel,
            percent=curve.percent,
            from_zero=curve.from_zero,
        )
        return _plot(curve.name, curve.title, curve.caption, curve.healthy, curve.group, figure)


def _draw_outcome(evaluation: Evaluation) -> Plot:
    """Accuracy of all contenders in both modes, with intervals."""
    modes: tuple[Mode, ...] = ("greedy", "sampled")  # from the bottom up
    with drawing.style("outcome"):
        figure, axes = drawing.new_axes(height=2.75)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=drawing.GRID, linewidth=0.8)
        for who, color in WHO_COLORS.items():
            label: str | None = who
            for row, mode in enumerate(modes):
                result = evaluation.accuracy(who, mode)  # type: ignore[arg-type]
                if result is None:
                    continue
                y = row + {"before": 0.2, "after": 0.0, "teacher": -0.2}[who]
                axes.plot([result.low, result.high], [y, y], color=color, linewidth=2.4, alpha=0.45)
                axes.plot([result.accuracy], [y], "o", color=color, markersize=6.5, label=label)
                label = None  # one entry in the legend
        axes.set_yticks(range(len(modes)), modes)
        axes.set_ylim(-0.5, len(modes) - 0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("problems answered right, with 95 % interval")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8.5)
        return _plot("outcome", "Accuracy before and after", "", "", "outcome", figure)


def _plot(name: str, title: str, caption: str, healthy: str, group: str, figure: Figure) -> Plot:
    svg, png = drawing.to_files(figure)
    return Plot(name, title, caption, healthy, group, drawing.inline_svg(svg, name, title), svg, png)


def _limits(steps: Numbers) -> tuple[float, float]:
    first, last = float(np.nanmin(steps)), float(np.nanmax(steps))
    margin = 0.015 * (last - first) or 1.0
    return first - margin, last + margin


def _column(training: Training, name: str) -> Numbers:
    values: Numbers = np.array([np.nan if v is None else v for v in training.series[name]], dtype=np.float64)
    return values
