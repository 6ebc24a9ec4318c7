"""Making a table: every stage of every setting, resumable at each; finished ones are not made again.

ROOT/<setting>/             a workspace: prefixes and scores once, ``compare`` for the rows
ROOT/<table>.json, .md      the numbers, the paper's beside ours
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from tropd.pipeline.config.paper_tables import ELSEWHERE, PaperTable, Setting
from tropd.pipeline.config.recipe_files import recipe_text
from tropd.pipeline.config.resolve import load_config
from tropd.pipeline.experiments.compare import compare
from tropd.pipeline.experiments.demo.prepare import prepare
from tropd.pipeline.experiments.paper_data import EVALUATIONS, training_source
from tropd.pipeline.experiments.sft import RESULT, sft
from tropd.pipeline.run.cells import FOLDER, REFERENCE, Cell
from tropd.pipeline.run.progress import Reporter
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.evaluate import read_marks
from tropd.pipeline.stages.evaluation.harness.judging import check_judges, fetch_questions
from tropd.pipeline.stages.evaluation.statistics import Estimate, average
from tropd.pipeline.stages.fetch import fetch_sources
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.stages.shards import Execution
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.workspace import Workspace


class MeasuredNumber(BaseModel):
    """One number of the table: accuracy in percent with its 95 % interval, and the paper's if known."""

    value: float
    low: float
    high: float
    paper: float | None = None


class ResultRow(BaseModel):
    """One line of the table."""

    label: str
    values: dict[str, MeasuredNumber]
    paper_only: dict[str, float] = {}
    """The paper's numbers of benchmarks that were not measured here."""


class ResultBlock(BaseModel):
    """One setting of the table."""

    title: str
    benchmarks: list[str]
    """Columns: those of the recipe, then others of the paper."""
    rows: list[ResultRow]


class Result(BaseModel):
    """A table that was made."""

    title: str
    rehearsal: bool
    seeds: int
    blocks: list[ResultBlock]


@dataclass(frozen=True)
class Job:
    """The options of making a table."""

    root: Path
    name: str
    table: PaperTable
    rehearsal: bool
    seeds: int
    workers: int
    assignments: tuple[str, ...]
    gpus: int = 1
    """GPUs of this machine to use, by one run after the other."""


def open_setting(job: Job, setting: Setting, reporter: Reporter) -> Run:
    """The workspace of a setting, with its recipe; an existing ``config.toml`` stays as it is."""
    workspace = Workspace.create(job.root / setting.name)
    if not workspace.config_path.exists():
        # A rehearsal has no number of the paper, and so none of these columns.
        theirs = "".join(one.settings(name) for name, one in ELSEWHERE.items() if name in setting.columns)
        write_text_atomic(workspace.config_path, recipe_text(setting.recipe) + theirs)
    return Run(workspace, load_config(workspace.config_path, job.assignments), reporter, job.assignments)


def reproduce(job: Job, reporter: Reporter) -> Result:
    """Make a table; killed and called again, it resumes.

    Raises:
        TropdError: of a stage.
    """
    blocks = []
    for setting in job.table.settings:
        reporter.info(f"{job.name}: {setting.title}")
        run = open_setting(job, setting, reporter)
        if run.config.demo.enabled:
            prepare(run)
        else:
            fetch_sources(run, [training_source(setting.domains, run.config.data.limit), *EVALUATIONS])
            fetch_questions(run)
            check_judges(run)
        # Teacher trajectories need no student, but its tokenizer is compared: where SFT makes it, that of its base.
        before = run
        if setting.sft_from is not None:
            before = _with(job, run, f'student.model="{setting.sft_from}"')
        on = Execution(gpus=job.gpus)
        generate_prefixes(before, execution=on)
        score_teacher(before, execution=on)
        if setting.sft_from is not None:
            sft(before, setting.sft_from, gpus=job.gpus)
            run = _with(job, run, f'student.model="{RESULT}"')
        cells = compare(
            run, [row.objective for row in setting.rows], job.seeds, workers=job.workers, gpus=job.gpus
        )
        blocks.append(made_block(run, setting, cells))
    result = Result(title=job.table.title, rehearsal=job.rehearsal, seeds=job.seeds, blocks=blocks)
    write_text_atomic(job.root / f"{job.name}.json", result.model_dump_json(indent=1) + "\n")
    write_text_atomic(job.root / f"{job.name}.md", to_markdown(result))
    return result


def _with(job: Job, run: Run, assignment: str) -> Run:
    assignments = (*job.assignments, assignment)
    return Run(run.workspace, load_config(run.workspace.config_path, assignments), run.reporter, assignments)


def made_block(run: Run, setting: Setting, cells: Sequence[Cell]) -> ResultBlock:
    """The numbers of a setting whose runs are finished."""
    root = run.workspace.root
    measured = [b.name for b in run.config.evaluation.benchmarks]
    benchmarks = [*measured, *(name for name in setting.columns if name not in measured)]
    reference = [root / FOLDER / REFERENCE]
    rows = [
        _row("student before", reference, "before", benchmarks, setting.paper_before),
        _row("teacher", reference, "teacher", benchmarks, setting.paper_teacher),
    ]
    for row in setting.rows:
        folders = [cell.folder(root) for cell in cells if cell.objective == row.objective]
        rows.append(_row(row.label, folders, "after", benchmarks, row.paper))
    return ResultBlock(title=setting.title, benchmarks=benchmarks, rows=rows)


def _row(
    label: str, folders: Sequence[Path], who: str, benchmarks: Sequence[str], paper: dict[str, float]
) -> ResultRow:
    values = {}
    for benchmark in benchmarks:
        parts = [folder / "eval" / benchmark / f"part-{who}.parquet" for folder in folders]
        harness = [part.with_name(f"harness-{who}.json") for part in parts]
        if all(part.is_file() for part in parts):
            found = _pooled(parts)
        elif all(part.is_file() for part in harness):
            found = _of_harness(harness)
        else:
            continue
        values[benchmark] = MeasuredNumber(
            value=100 * found.value, low=100 * found.low, high=100 * found.high, paper=paper.get(benchmark)
        )
    others = {name: paper[name] for name in benchmarks if name in paper and name not in values}
    return ResultRow(label=label, values=values, paper_only=others)


def _of_harness(paths: Sequence[Path]) -> Estimate:
    """Mean over seeds of the harness's own metric: the one that takes the answer wherever it stands, or the first."""
    values, errors = [], []
    for path in paths:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        chosen = next((metric for metric in metrics if "flexible" in metric["name"]), metrics[0])
        values.append(float(chosen["value"]))
        errors.append(float(chosen["stderr"] or 0.0))
    mean = math.fsum(values) / len(values)
    half = 1.96 * math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
    return Estimate(mean, mean - half, mean + half)


def _pooled(paths: Sequence[Path]) -> Estimate:
    """avg@n over all seeds: a problem's responses of every seed together."""
    marks: dict[str, list[bool]] = {}
    for path in paths:
        for problem, correct in read_marks(path)["sampled"].items():
            marks.setdefault(problem, []).extend(correct)
    return average(list(marks.values()))


def to_markdown(result: Result) -> str:
    """The table as text: ours with intervals, the paper's in parentheses."""
    lines = [f"# {result.title}", ""]
    if result.rehearsal:
        lines += ["Rehearsal with tiny models: these numbers say nothing about the methods.", ""]
    for block in result.blocks:
        lines += [f"## {block.title}", "", "| method | " + " | ".join(block.benchmarks) + " |"]
        lines.append("|---" * (1 + len(block.benchmarks)) + "|")
        for row in block.rows:
            cells = []
            for benchmark in block.benchmarks:
                cell = row.values.get(benchmark)
                if cell is None:
                    alone = row.paper_only.get(benchmark)
                    cells.append("–" if alone is None else f"– (paper {alone:.2f})")
                    continue
                paper = "" if cell.paper is None else f" (paper {cell.paper:.2f})"
                cells.append(f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]{paper}")
            lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append("avg@n in percent, 95 % intervals over problems.")
    return "\n".join(lines) + "\n"
