"""The dashboard of a training run: its metrics so far, drawn for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tropd.cli.terminal import shown
from tropd.pipeline.report.data.phases import AT_WORK, EXCHANGES, PHASE_TOKENS, by_process, idle_shares
from tropd.pipeline.report.page.formats import human_bytes

if TYPE_CHECKING:
    from tropd.pipeline.report.data.facts import Verdict

BLOCKS = "▁▂▃▄▅▆▇█"
VERDICT_STYLES = {"problem": "bold red", "warning": "yellow"}
RECENT = 20
WIDE = 96
SHOWN_QUEUE_SECONDS = 0.05


@dataclass(frozen=True)
class Dashboard:
    """State of a run; renders to the available width."""

    title: str
    records: Sequence[Mapping[str, Any]]
    """Metrics per step, oldest first."""
    total: int
    """Planned steps."""
    state: str = ""
    """A remark beside the title: finished, waiting, …"""
    verdicts: Sequence[Verdict] = ()
    """Verdicts on the steps so far."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        yield _line(Text(self.title, style="bold"), Text(self.state, style="yellow"))
        yield self._progress(options.max_width)
        if not self.records:
            return
        curves, facts = self._curves(24 if wide else 16), self._facts()
        if wide:
            both = Table.grid(padding=(0, 4))
            both.add_row(curves, facts)
            yield both
        else:
            yield Group(curves, facts)
        for verdict in self.verdicts:
            yield Text.assemble(
                (f"{verdict.level}: ", VERDICT_STYLES[verdict.level]), shown(verdict.sentence)
            )

    def _progress(self, width: int) -> RenderableType:
        done = int(self.records[-1]["step"]) + 1 if self.records else 0
        words = [f"{done}/{self.total} steps"]
        seconds = recent_mean(self.records, "time_total")
        if seconds and done < self.total:
            words.append(f"{timedelta(seconds=round(seconds * (self.total - done)))} left")
        tokens = recent_mean(self.records, "tokens_on_policy")
        if seconds and tokens:
            words.append(f"{tokens / seconds:,.0f} tokens/s")
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.total, 1), completed=done, width=max(10, min(40, width - 50)))
        grid.add_row(bar, Text("  ".join(words), no_wrap=True))
        return grid

    def _curves(self, width: int) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim")
        grid.add_column(justify="right", min_width=7)
        for name, form, values in self._shown():
            known = [value for value in values if value is not None]
            if known:
                grid.add_row(name, form(known[-1]), Text(sparkline(known, width), style="cyan"))
        return grid

    def _shown(self) -> list[tuple[str, Callable[[float], str], list[float | None]]]:
        accuracy = column(self.records, "accuracy_sampled")
        k1 = column(self.records, "k1_mean")
        reward = column(self.records, "reward_mean")
        if all(value is None for value in reward):  # of on-policy distillation it is the teacher's advantage
            reward = [None if value is None else -value for value in k1]
        measured = any(value is not None for value in accuracy)
        return [
            ("loss", _number, column(self.records, "loss")),
            ("K1", _number, k1),
            ("outliers", _percent, column(self.records, "region_fraction_outlier")),
            ("accuracy", _percent, accuracy) if measured else ("reward", _number, reward),
            ("reverse KL", _number, column(self.records, "distance_reverse_kl")),
            ("forward KL", _number, column(self.records, "distance_forward_kl")),
        ]

    def _facts(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim")
        for name, words in (
            ("step", _step_time(self.records)),
            ("teacher", _teacher(self.records)),
            ("length", _lengths(self.records[-1])),
            ("held-out", _held_out(self.records)),
            ("memory", _memory(self.records[-1])),
            ("speed", _speed(self.records)),
        ):
            if words:
                grid.add_row(name, words)
        return grid


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks from the lowest to the highest; more than ``width`` are averaged in groups."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    groups = min(width, len(finite))
    bounds = [round(i * len(finite) / groups) for i in range(groups + 1)]
    means = [math.fsum(finite[low:high]) / (high - low) for low, high in pairwise(bounds)]
    lowest, highest = min(means), max(means)
    spread = (highest - lowest) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((m - lowest) / spread * len(BLOCKS)))] for m in means)


def column(records: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """A metric per step; None where it is missing or no finite number."""
    found = []
    for record in records:
        value = record.get(name)
        usable = (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
        )
        found.append(float(value) if usable and value is not None else None)
    return found


def recent_mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the last steps that have it."""
    known = [value for value in column(records, name) if value is not None][-RECENT:]
    return math.fsum(known) / len(known) if known else None


def _line(*texts: Text) -> Text:
    return Text("  ").join(text for text in texts if text.plain)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _step_time(records: Sequence[Mapping[str, Any]]) -> str:
    total = recent_mean(records, "time_total")
    if not total:
        return ""
    parts = [(name, recent_mean(records, f"time_{name}")) for name in ("rollout", "score", "train")]
    shares = [f"{name} {value / total:.0%}" for name, value in parts if value is not None]
    waited = recent_mean(records, "time_wait")
    prepared = math.fsum(value or 0.0 for _, value in parts[:2])
    if waited is not None and waited < 0.9 * prepared:  # they overlap with training
        shares.append(f"waiting {waited / total:.0%}")
    idle = idle_shares(
        [by_process(r.get(EXCHANGES)) | {"time_total": r.get("time_total", 0.0)} for r in records[-RECENT:]]
    )
    if idle:  # of several processes: their GPUs wait for the slowest one
        shares.append(f"idle {min(idle):.0%} to {max(idle):.0%}")
    return f"{total:.3g} s: {', '.join(shares)}" if shares else f"{total:.3g} s"


def _speed(records: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second of each part of the step."""
    words = []
    for part, names in PHASE_TOKENS.items():
        seconds = recent_mean(records, AT_WORK.get(part, "")) or recent_mean(records, f"time_{part}")
        tokens = math.fsum(recent_mean(records, name) or 0.0 for name in names)
        if seconds and tokens:
            words.append(f"{part} {tokens / seconds:,.0f}")
    mfu = recent_mean(records, "mfu_train")
    return (f"{', '.join(words)} tokens/s" if words else "") + ("" if mfu is None else f", MFU {mfu:.0%}")


def _teacher(records: Sequence[Mapping[str, Any]]) -> str:
    scored = math.fsum(value or 0.0 for value in column(records, "teacher_tokens_scored"))
    if not scored:
        return ""
    ranked = math.fsum(value or 0.0 for value in column(records, "teacher_topk_tokens"))
    received = math.fsum(value or 0.0 for value in column(records, "teacher_bytes_received"))
    words = [f"{scored:,.0f} tokens", f"{ranked / scored:.0%} with alternatives", human_bytes(received)]
    retries = sum(sum(r.get("teacher_retries") or ()) for r in records)
    words += [f"{retries} retries"] if retries else []
    queued = recent_mean(records, "time_queue")
    words += [f"queue {queued:.3g} s a step"] if queued and queued >= SHOWN_QUEUE_SECONDS else []
    return ", ".join(words)


def _lengths(record: Mapping[str, Any]) -> str:
    length, prefix = (column([record], f"{name}_length_mean")[0] for name in ("response", "prefix"))
    if length is None:
        return ""
    return f"{length:.1f} tokens" + ("" if prefix is None else f", {prefix:.1f} of them from the teacher")


def _held_out(records: Sequence[Mapping[str, Any]]) -> str:
    """Lengths and acceptance of the newest evaluation; the KLs have curves."""
    found: Mapping[str, Any] = next(
        (record for record in reversed(records) if "distance_length" in record), {}
    )
    length, teacher, acceptance = (
        column([found], f"distance_{name}")[0] for name in ("length", "teacher_length", "acceptance")
    )
    if length is None:
        return ""
    beside = "" if teacher is None else f" (teacher {teacher:.1f})"
    accepted = "" if acceptance is None else f", acceptance {_percent(acceptance)}"
    return f"{length:.1f} tokens{beside}{accepted}"


def _memory(record: Mapping[str, Any]) -> str:
    main, gpu = (column([record], f"memory_{name}")[0] for name in ("rss", "gpu_peak"))
    parts = [
        "" if main is None else human_bytes(main),
        "" if gpu is None else f"{human_bytes(gpu)} of the GPU",
    ]
    for name in PHASE_TOKENS:
        (peak,) = column([record], f"memory_peak_{name}")
        parts.append("" if peak is None else f"{name} {human_bytes(peak)}")
    return ", ".join(part for part in parts if part)
