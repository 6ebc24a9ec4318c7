"""Output for people: progress bars on a terminal, plain lines elsewhere, tables and JSON."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from tropd.cli.dashboard import VERDICT_STYLES, Dashboard
from tropd.cli.terminal import shown, takes_unicode
from tropd.pipeline.run.progress import Reporter, Steps, Task

if TYPE_CHECKING:
    from tropd.pipeline.report.data.facts import Verdict
    from tropd.pipeline.report.watch import TrainingProgress

# Progress and messages go to stderr, so that stdout holds results only.
# Lines into a pipe or a file are not cut to the width of a terminal.
PIPE_WIDTH = 200
# Markup and emoji codes are off: output holds paths, prompts and answers, in which they are text.
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
stdout = Console(
    highlight=False,
    soft_wrap=True,
    markup=False,
    emoji=False,
    width=None if sys.stdout is not None and sys.stdout.isatty() else PIPE_WIDTH,
)
PLAIN_INTERVAL_SECONDS = 10.0
WATCH_INTERVAL_SECONDS = 1.0
PATIENCE_SECONDS = 1.0
"""Seconds before libraries that still load are mentioned."""


def say(text: str, *, style: str = "", end: str = "\n") -> None:
    """A result, on standard output."""
    stdout.print(shown(text), style=style, end=end)


def tell(text: str, *, label: str = "", style: str = "") -> None:
    """A message, on standard error; the label before it has the style."""
    stderr.print(Text.assemble((label, style), shown(text)))


def tell_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Show the verdicts on a run with their remedies, a line each."""
    for verdict in verdicts:
        tell(verdict.line, label=f"{verdict.level}: ", style=VERDICT_STYLES[verdict.level])


_started = threading.Event()


def announce_start() -> None:
    """Say that libraries are loading, if that takes longer than a moment; until a reporter is made."""
    threading.Thread(target=_keep_saying, args=("loading libraries", _started), daemon=True).start()


def _keep_saying(description: str, ended: threading.Event) -> None:
    began = time.monotonic()
    if ended.wait(PATIENCE_SECONDS):
        return
    tell(f"{description} …")
    while not ended.wait(PLAIN_INTERVAL_SECONDS):
        tell(f"{description}: {time.monotonic() - began:.0f} s")


def make_reporter() -> Reporter:
    """Bars if stderr is a terminal, a line every ten seconds otherwise."""
    _started.set()
    return _TerminalReporter() if stderr.is_terminal else _PlainReporter()


class _RateColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_pace(speed, f" {task.fields['unit']}") if speed else "", style="dim")


def _pace(speed: float, unit: str = "") -> str:
    """Work a second; of what takes longer, such as a step of a large model, the seconds of one."""
    return f"{speed:,.1f}{unit}/s" if speed >= 1 else f"{1 / speed:,.1f} s each"


class _Verdicts:
    """Verdicts on the steps so far, computed only now and then, since they read all steps."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._found: list[Verdict] = []
        self._looked = -math.inf

    def of(self, records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        from tropd.pipeline.report.verdicts.training_verdicts import columns_of, training_verdicts

        now = time.monotonic()
        if now - self._looked >= PLAIN_INTERVAL_SECONDS:
            self._looked = now
            self._found = training_verdicts(columns_of(records), self._settings)
        return self._found


class _LiveSteps:
    """The dashboard on a terminal, renewed with every step."""

    def __init__(
        self,
        live: Live,
        title: str,
        total: int,
        earlier: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        self._live, self._title, self._total = live, title, total
        self._records, self._verdicts = list(earlier), _Verdicts(settings)

    def step(self, record: Mapping[str, Any]) -> None:
        self._records.append(record)
        verdicts = self._verdicts.of(self._records)
        self._live.update(Dashboard(shown(self._title), self._records, self._total, verdicts=verdicts))


class _BarTask:
    def __init__(self, progress: Progress, identity: Any) -> None:
        self._progress = progress
        self._identity = identity

    def advance(self, amount: float = 1, **values: object) -> None:
        self._progress.update(self._identity, advance=amount, values=_format_values(values))


class _PlainTask:
    def __init__(self, description: str, total: float, done: float, unit: str) -> None:
        self._description, self._total, self._done, self._unit = description, total, done, unit
        self._first = done
        self._started = self._said = time.monotonic()

    def advance(self, amount: float = 1, **values: object) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= PLAIN_INTERVAL_SECONDS or self._done >= self._total:
            self._said = now
            elapsed = now - self._started
            rate = (self._done - self._first) / elapsed if elapsed > 0 else 0.0
            pace = [_pace(rate)] if rate > 0 else []
            if rate > 0 and self._done < self._total:
                pace.append(f"{(self._total - self._done) / rate:.0f} s left")
            beside = f" ({', '.join(pace)})" if pace else ""
            tell(
                f"{self._description}: {self._done:g}/{self._total:g} {self._unit}{beside} "
                f"{_format_values(values)}".rstrip()
            )


class _PlainSteps:
    def __init__(self, total: int, earlier: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        self._task = _PlainTask("train", total, len(earlier), "steps")
        self._records, self._verdicts = list(earlier), _Verdicts(settings)
        self._told: set[str] = set()

    def step(self, record: Mapping[str, Any]) -> None:
        shown = {"loss": "loss", "k1": "k1_mean", "outlier": "region_fraction_outlier"}
        shown |= {"reward": "reward_mean"} if "reward_mean" in record else {}
        shown |= {"accuracy": "accuracy_sampled"} if "accuracy_sampled" in record else {}
        shown |= {f"{way} KL": f"distance_{way}_kl" for way in ("reverse", "forward")}
        self._task.advance(1, **{name: record.get(metric) for name, metric in shown.items()})
        self._records.append(record)
        new = [found for found in self._verdicts.of(self._records) if found.name not in self._told]
        self._told |= {found.name for found in new}
        tell_verdicts(new)


class _Messages:
    def info(self, message: str) -> None:
        tell(message)

    def warning(self, message: str) -> None:
        tell(message, label="warning: ", style="yellow")


class _TerminalReporter(_Messages):
    @contextmanager
    def task(self, description: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        columns = (
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[values]}", style="dim", markup=False),
        )
        with Progress(*columns, console=stderr) as progress:
            identity = progress.add_task(description, total=total, completed=int(done), values="", unit=unit)
            yield _BarTask(progress, identity)

    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=stderr, transient=True) as progress:
            progress.add_task(shown(description), total=None)
            yield

    @contextmanager
    def training(
        self, title: str, total: int, earlier: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[Steps]:
        with Live(Dashboard(shown(title), earlier, total), console=stderr, refresh_per_second=2) as live:
            yield _LiveSteps(live, title, total, earlier, settings)


class _PlainReporter(_Messages):
    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        ended = threading.Event()
        speaker = threading.Thread(target=_keep_saying, args=(description, ended), daemon=True)
        speaker.start()
        try:
            yield
        finally:
            ended.set()
            speaker.join()

    @contextmanager
    def training(
        self, title: str, total: int, earlier: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[Steps]:
        yield _PlainSteps(total, earlier, settings)

    @contextmanager
    def task(self, description: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        yield _PlainTask(description, total, done, unit)


def follow_training(look: Callable[[], TrainingProgress]) -> None:
    """Show a training run and look again every second, until it is finished or Ctrl-C."""
    with Live(console=stdout, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            found = look()
            title = shown(found.title)
            live.update(
                Dashboard(title, found.records, found.total, found.state, found.verdicts), refresh=True
            )
            if found.state == "finished":
                return
            time.sleep(WATCH_INTERVAL_SECONDS)


def _format_values(values: Mapping[str, object]) -> str:
    return " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value is not None
    )


# Controls that JSON leaves unescaped, and halves of surrogate pairs, which no encoding accepts.
_NOT_JSON = re.compile(r"[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=not takes_unicode(), default=str)
    say(_NOT_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout; numbers are right-aligned."""
    table = Table(
        title=title and shown(title), title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(shown(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    stdout.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    return shown(f"{value:.6g}" if isinstance(value, float) else str(value))
