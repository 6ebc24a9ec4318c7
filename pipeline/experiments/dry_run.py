"""The plan of a table: its stages as commands, GPU-hours, disk, downloads; and checks of every row before the first.

GPU-hours are predictions from the rates of an H100 (``preflight/rates.toml``), with every response of full length.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tropd.pipeline.config.paper_tables import ELSEWHERE, Setting
from tropd.pipeline.config.schema import Config
from tropd.pipeline.experiments.compare import cell_config
from tropd.pipeline.experiments.reproduce import Job, open_setting
from tropd.pipeline.experiments.row_checks import check_engines, check_table_rows, row_needs
from tropd.pipeline.experiments.table_columns import check_elsewhere
from tropd.pipeline.models.tokenizers import check_tokenizers
from tropd.pipeline.run.cells import Cell
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.memory_plan import CACHE_BYTES, ModelShape
from tropd.pipeline.training.preflight.checks import Check, check_machine, check_teacher_stages
from tropd.pipeline.training.preflight.machine import Machine, look_at_machine
from tropd.pipeline.training.preflight.needs import Needs
from tropd.pipeline.training.preflight.preflight import needs_of
from tropd.pipeline.training.preflight.stage_time import (
    scoring_hours,
    sft_hours,
    training_hours,
    writing_hours,
)
from tropd.storage.errors import TropdError
from tropd.storage.workspace import shown_path

PROBLEMS = 40
"""Of a benchmark that tropd has itself: 30 or 40 in the tables."""


@dataclass(frozen=True)
class StagePlan:
    """One line of the plan."""

    what: str
    command: str
    gpu_hours: float
    disk_bytes: float
    step_seconds: float | None = None
    """Of a step of training."""


@dataclass(frozen=True)
class SettingPlan:
    """The plan of one setting."""

    title: str
    stages: list[StagePlan]
    download_bytes: float
    checks: list[Check]


def plan_table(job: Job, machine: Machine | None = None, *, runs_here: bool = False) -> Iterator[SettingPlan]:
    """Plan every setting; nothing is made but the workspaces with their configuration.

    Args:
        machine: another one than this.
        runs_here: the table is about to be made: GPUs that are not there count.
    """
    machine = machine or look_at_machine(job.root)
    for setting in job.table.settings:
        run = open_setting(job, setting, SILENT)
        if setting.sft_from is not None:  # the student is made by a stage: its size is that of its base
            run = open_setting(
                replace(job, assignments=(*job.assignments, f'student.model="{setting.sft_from}"')),
                setting,
                SILENT,
            )
        sizes = (
            ModelShape(**setting.student_sizes.model_dump()),
            ModelShape(**setting.teacher_sizes.model_dump()),
        )
        needs, checks = needs_of(run, job.gpus, sizes=sizes, machine=machine)
        stages = []
        if needs is not None:
            stages = list(_stages(job, setting, run, needs))
            disk = sum(stage.disk_bytes for stage in stages)
            checks += check_machine(needs, machine, disk=disk, runs_here=runs_here)
            checks += [
                *check_teacher_stages(needs, machine),
                *checks_of_rows(run, setting, _of_a_run(job, needs), machine),
            ]
        yield SettingPlan(
            title=setting.title,
            stages=stages,
            download_bytes=2.0 * (sizes[0].parameters + sizes[1].parameters) * (not job.rehearsal),
            checks=[
                *checks,
                *_checks(job, setting, run),
                *check_elsewhere(run, setting, runs_here=runs_here),
            ],
        )


def _cells(run: Run, setting: Setting) -> dict[str, Config]:
    """Configuration of every row by its label."""
    return {row.label: cell_config(run, Cell(row.objective, run.config.run.seed)) for row in setting.rows}


def _stages(job: Job, setting: Setting, run: Run, needs: Needs) -> Iterator[StagePlan]:
    config, where = run.config, f"-w {shlex.quote(shown_path(run.workspace.root))}"
    on = f" --gpus {job.gpus}" if job.gpus > 1 else ""
    apart = f" --workers {job.workers}" if job.workers > 1 else ""
    student, length = needs.student.parameters, config.prefix_max_tokens
    prefixes = (config.data.limit or config.demo.train_problems) * config.prefixes.samples_per_prompt
    tokens = prefixes * length
    if config.demo.enabled:
        yield StagePlan("models and problems", f"tropd prepare {where}", 0.0, 1e7)
    else:
        yield StagePlan("problems", "(fetched from the Hugging Face hub)", 0.0, 5e8)
    writing = (
        0.0 if needs.on_cpu else _written(needs, "teacher", prefixes, length, config.prefixes.batch_size)
    )
    yield StagePlan("prefixes", f"tropd generate-prefixes {where}{on}", writing, 8.0 * tokens)
    scoring = 0.0 if needs.on_cpu else scoring_hours(needs, responses=prefixes, length=length)
    yield StagePlan("scores", f"tropd score-teacher {where}{on}", scoring, float(CACHE_BYTES * tokens))
    if setting.sft_from is not None:
        command = f"tropd sft {where} --from {setting.sft_from}{on}"
        yield StagePlan(
            "SFT", command, 0.0 if needs.on_cpu else sft_hours(needs), 2.0 * 12 * student + 2.0 * student
        )
    runs = f" --seeds {job.seeds}{apart}{on}"
    compare = f"tropd compare {where} --objectives"
    for row, (label, own) in zip(setting.rows, _cells(run, setting).items(), strict=True):
        mine = row_needs(_of_a_run(job, needs), own)
        kept = config.train.keep_checkpoints + 1  # one more while a new one is written
        yield StagePlan(
            f"{label}: train, evaluate",
            f"{compare} {shlex.quote(row.objective)}{runs}",
            0.0 if needs.on_cpu else job.seeds * (training_hours(mine) + _evaluated(mine, "student")),
            job.seeds * (kept * 12.0 * student + 2.0 * student),
            None if needs.on_cpu else mine.step().total,
        )
    before = 0.0 if needs.on_cpu else _evaluated(needs, "student") + _evaluated(needs, "teacher")
    yield StagePlan("student before, teacher: evaluate", "(with the first row)", before, 0.0)


def _written(needs: Needs, role: str, responses: int, length: int, batch_size: int) -> float:
    shape = needs.teacher if role == "teacher" else needs.student
    engine = needs.config.teacher.engine if role == "teacher" else needs.config.student.engine
    return writing_hours(needs, shape, engine, responses=responses, length=length, batch_size=batch_size)


def _evaluated(needs: Needs, role: str) -> float:
    """GPU-hours of a model's answers to all benchmarks: one greedy, and the sampled ones."""
    config = needs.config
    return sum(
        _written(
            needs,
            role,
            ELSEWHERE[name].problems * part.samples if name in ELSEWHERE else PROBLEMS * (1 + part.samples),
            part.max_tokens or config.rollout.max_tokens,
            config.evaluation.batch_size,
        )
        for name, part in config.evaluation_sets.items()
    )


def _of_a_run(job: Job, needs: Needs) -> Needs:
    """Several runs at the same time have a GPU each."""
    return replace(needs, gpus=1) if job.workers > 1 else needs


def checks_of_rows(run: Run, setting: Setting, needs: Needs, machine: Machine) -> Iterator[Check]:
    """Check each row of a setting against its teacher and the GPUs."""
    try:
        cells = _cells(run, setting)
    except TropdError as error:  # the message names the method and the setting
        yield Check(False, error.message)
        return
    yield from check_engines(run, cells)
    yield from check_table_rows(needs, cells, machine)


def _checks(job: Job, setting: Setting, run: Run) -> Iterator[Check]:
    yield Check(True, f"names: recipe {setting.recipe!r}, {len(setting.rows)} objectives, all packaged")
    yield _tokenizers(run, setting)
    if not job.rehearsal:
        yield _hub(run.config, setting)


def _tokenizers(run: Run, setting: Setting) -> Check:
    if run.config.demo.enabled:
        return Check(True, "tokenizers: student and teacher are made with the same one")
    models = [setting.sft_from or run.config.student.model, run.config.teacher.model]
    if not all(run.workspace.resolve(model).exists() for model in models):
        return Check(None, f"tokenizers: not compared, for {' and '.join(models)} are not on this machine")
    try:
        check_tokenizers(role_tokenizer(run, "student"), role_tokenizer(run, "teacher"))
    except TropdError as error:
        return Check(False, f"tokenizers: {error.message}")
    return Check(True, "tokenizers: student and teacher have the same")


def _hub(config: Config, setting: Setting) -> Check:
    names = f"{setting.sft_from or config.student.model}, {config.teacher.model}, OpenThoughts3, AIME24, AIME25, AMC23"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check(None, f"hub: HF_HUB_OFFLINE is set, so it was not asked for {names}")
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return Check(None, f"hub: no network, so it was not asked for {names}")
    return Check(True, "hub: huggingface.co answers")
