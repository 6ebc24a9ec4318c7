"""Plots of several runs: one curve per run, which the page can hide.

Everything that belongs to a run has an id that ends in ``-run-N``. The page names the runs beside its checkboxes; the
files have a legend instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tropd.pipeline.report.data.facts import RunSummary
from tropd.pipeline.report.data.runs import COMPARED
from tropd.pipeline.report.plots import drawing
from tropd.pipeline.report.plots.curves import CURVES, Curve
from tropd.pipeline.report.plots.drawing import Numbers, Plot
from tropd.storage.workspace import Mode

_SMOOTH_FROM = 24
_MAX_NAME = 28
_MODES: tuple[tuple[Mode, str, float], ...] = (("sampled", "o", 0.14), ("greedy", "D", -0.14))


def draw_runs(runs: Sequence[RunSummary]) -> list[Plot]:
    """Accuracies of all runs, and every compared metric that one of them has."""
    if not runs:
        return []
    plots = [_draw_accuracies(runs)] if any(_is_graded(run) for run in runs) else []
    return [*plots, *(plot for name in COMPARED if (plot := _draw_metric(name, runs)) is not None)]


def _is_graded(run: RunSummary) -> bool:
    after = run.evaluation.after
    return after is not None and bool(after.sampled or after.greedy)


def _draw_metric(metric: str, runs: Sequence[RunSummary]) -> Plot | None:
    curve, label = _described(metric)
    name = f"runs-{metric.replace('_', '-')}"
    with drawing.style(name):
        figure, axes = drawing.new_axes()
        for index, run in enumerate(runs):
            steps, values = _column(run, "step"), _column(run, metric)
            known = ~np.isnan(values)
            if not known.any():
                continue
            shown = values[known]
            if len(shown) >= _SMOOTH_FROM:
                shown = drawing.moving_average(shown, max(5, len(shown) // 15))
            few = {"marker": "o", "markersize": 3.5} if len(shown) <= 40 and len(shown) < len(values) else {}
            line = drawing.look(index).arguments
            axes.plot(steps[known], shown, label=_name(run), gid=f"line-run-{index}", **line, **few)
        if not axes.lines:
            return None
        drawing.finish(
            figure,
            axes,
            xlabel="step",
            ylabel=curve.ylabel,
            percent=curve.percent,
            from_zero=curve.from_zero,
            legend=False,
        )
        title = curve.title if len(curve.lines) == 1 else f"{curve.title}: {label}"
        return _plot(name, title, figure)


def _described(metric: str) -> tuple[Curve, str]:
    return next((c, line.label) for c in CURVES for line in c.lines if line.metric == metric)


def _column(run: RunSummary, name: str) -> Numbers:
    values: Numbers = np.array(
        [np.nan if v is None else v for v in run.series.get(name, [])], dtype=np.float64
    )
    return values


def _name(run: RunSummary) -> str:
    """Its label as it can stand in a drawing: plain, and not too long."""
    plain = re.sub(r"[^ -~\u00a0-\u024f]", "·", run.label)
    return plain if len(plain) <= _MAX_NAME else f"{plain[: _MAX_NAME // 2]}…{plain[-_MAX_NAME // 2 :]}"


def _draw_accuracies(runs: Sequence[RunSummary]) -> Plot:
    """Draw each student's accuracies after training in both modes, with intervals."""
    name = "runs-outcome"
    with drawing.style(name):
        figure, axes = drawing.new_axes(height=max(2.4, 1.1 + 0.36 * len(runs)))
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=drawing.GRID, linewidth=0.8)
        rows = range(len(runs) - 1, -1, -1)  # the first on top
        for index, (run, row) in enumerate(zip(runs, rows, strict=True)):
            color = drawing.look(index).color
            for mode, marker, shift in _MODES:
                found = run.evaluation.accuracy("after", mode)
                if found is None:
                    continue
                y, gid = row + shift, f"{mode}-run-{index}"
                ends = [found.low, found.high]
                axes.plot(ends, [y, y], color=color, linewidth=2.4, alpha=0.45, gid=f"interval-{gid}")
                axes.plot([found.accuracy], [y], marker, color=color, markersize=5, gid=gid)
        for mode, marker, _ in _MODES:
            axes.plot([], [], marker, color=drawing.INK, markersize=5, label=mode)
        axes.set_yticks(list(rows), [_name(run) for run in runs])
        for index, text in enumerate(axes.get_yticklabels()):
            text.set_gid(f"name-run-{index}")
        axes.set_ylim(-0.5, len(runs) - 0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("problems answered right, with 95 % interval")
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)
        return _plot(name, "Accuracy after training", figure, legend=False)


def _plot(name: str, title: str, figure: Figure, *, legend: bool = True) -> Plot:
    inline = drawing.inline_svg(drawing.to_svg(figure), name, title)
    if legend:
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)
    return Plot(name, title, "", "", "runs", inline, *drawing.to_files(figure))
