"""Axis limits, numbers on ticks, smoothing, and SVG made part of a page."""

from __future__ import annotations

import numpy as np
import pytest

from tropd.pipeline.report.plots import drawing


def test_numbers_on_ticks() -> None:
    values = (0.0, 0.25, -0.4, 9999, 12_000, -3.5e6, 2e9, 5e-5, -1.25e-4)
    assert [drawing.short_number(v) for v in values] == [
        "0", "0.25", "−0.4", "9999", "12 k", "−3.5 M", "2 G", "5e−5", "−1.25e−4",
    ]  # fmt: skip
    assert drawing.short_number(1.00002, 7) == "1.00002"


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 1.0), (0.2, 0.9), (0.0, 0.001)])
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_share_has_no_axis_far_beyond_0_and_100_percent(low: float, high: float, from_zero: bool) -> None:
    bottom, top = drawing.limits(low, high, percent=True, from_zero=from_zero)
    assert -0.03 < bottom <= low
    assert high <= top < 1.03
    assert bottom < top


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-3.0, -3.0), (-2.0, 5.0), (1e-9, 1e-9)])
def test_limits_hold_the_data(low: float, high: float) -> None:
    for from_zero in (True, False):
        bottom, top = drawing.limits(low, high, percent=False, from_zero=from_zero)
        assert bottom <= low <= high <= top
        assert bottom < top


def test_the_moving_average_keeps_constants_and_does_not_shift() -> None:
    assert drawing.moving_average(np.full(30, 2.5), 7) == pytest.approx(np.full(30, 2.5))
    line = np.arange(30, dtype=float)
    assert drawing.moving_average(line, 7)[10:20] == pytest.approx(line[10:20])
    assert len(drawing.moving_average(np.array([1.0, 2.0]), 5)) == 2


def test_equal_figures_give_equal_svg_that_follows_the_theme() -> None:
    def draw() -> str:
        with drawing.style("test"):
            figure, axes = drawing.new_axes()
            axes.plot([0, 1], [0, 1], color=drawing.BLUE)
            drawing.finish(figure, axes, xlabel="step", ylabel="x", percent=False, from_zero=True)
            return drawing.to_svg(figure)

    svg = draw()
    assert svg == draw()
    inline = drawing.inline_svg(svg, "one", 'a "label" <b>')
    assert inline.startswith("<svg viewBox=")
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in inline
    assert "var(--blue)" in inline
    assert drawing.BLUE not in inline
    assert "http" not in inline
