"""Rows of the report's benchmark table, from the evaluation's summary: avg@n, pass@k, and lm-eval's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tropd.pipeline.config.paper_tables import load_table, table_names
from tropd.pipeline.report.data.facts import Report
from tropd.pipeline.report.page.formats import percent
from tropd.storage.workspace import EVALUATED


@dataclass(frozen=True)
class BenchmarkCell:
    """One model's number, and its uncertainty."""

    value: str
    detail: str


@dataclass(frozen=True)
class BenchmarkRow:
    """A metric of a benchmark, for each model that has it."""

    benchmark: str
    metric: str
    cells: dict[str, BenchmarkCell] = field(default_factory=dict)
    paper: float | None = None
    """Percent after training in the paper, where the run's recipe and objective make one of its rows."""


def benchmark_rows(report: Report) -> list[BenchmarkRow]:
    """All benchmarks of a finished evaluation; the run's own problems too, where more than their average is known."""
    stage = report.stages.get("eval")
    summary = stage.summary if stage is not None else {}
    rows: dict[tuple[str, str], BenchmarkRow] = {}

    published = paper_numbers(report)

    def add(benchmark: str, metric: str, who: str, cell: BenchmarkCell) -> None:
        paper = published.get(benchmark) if metric.startswith("avg@") else None
        rows.setdefault((benchmark, metric), BenchmarkRow(benchmark, metric, paper=paper)).cells[who] = cell

    for name, models in _tables(summary.get("sampled")):
        for who, found in _tables(models):
            samples, passes = found.get("samples"), dict(_tables(found.get("pass_at")))
            if who not in EVALUATED or (name == "eval" and samples == 1 and not passes):
                continue
            shown = "held-out problems" if name == "eval" else name
            if average := _interval(found.get("average")):
                add(shown, f"avg@{samples}", who, average)
            for k, estimate in passes.items():
                if rate := _interval(estimate):
                    add(shown, f"pass@{k}", who, rate)
    for name, models in _tables(summary.get("harness")):
        for who, metrics in models.items():
            for metric in metrics if isinstance(metrics, list) else []:
                if who in EVALUATED and (cell := _measured(metric)):
                    add(name, str(metric.get("name")), who, cell)
    return list(rows.values())


def paper_numbers(report: Report) -> dict[str, float]:
    """The paper's percentages by benchmark for the row that this run reproduces, if it does."""
    config = report.config or {}
    recipe = config.get("run", {}).get("recipe")
    objective = config.get("objective", {}).get("name")
    found: dict[str, float] = {}
    for table in table_names():
        for setting in load_table(table, rehearse=False).settings:
            for row in setting.rows:
                if (setting.recipe, row.objective) == (recipe, objective):
                    found = row.paper | found  # the main table comes first
    return found


def _tables(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The tables in a table; a damaged summary has none."""
    return [(k, v) for k, v in value.items() if isinstance(v, dict)] if isinstance(value, dict) else []


def _interval(estimate: Any) -> BenchmarkCell | None:
    numbers = _numbers(estimate, "value", "low", "high")
    if numbers is None:
        return None
    value, low, high = numbers
    return BenchmarkCell(percent(value), f"{percent(low)} to {percent(high)}")


def _measured(metric: Any) -> BenchmarkCell | None:
    numbers = _numbers(metric, "value")
    if numbers is None:
        return None
    form: Callable[[float], str] = percent if 0.0 <= numbers[0] <= 1.0 else "{:.4g}".format
    error = _numbers(metric, "stderr")
    return BenchmarkCell(form(numbers[0]), "" if error is None else f"± {form(error[0])}")


def _numbers(value: Any, *names: str) -> list[float] | None:
    found = [value.get(name) for name in names] if isinstance(value, Mapping) else [None]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in found):
        return None
    return [float(number) for number in found if number is not None]
