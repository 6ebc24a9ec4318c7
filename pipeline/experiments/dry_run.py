"""The plan of a table: its stages as commands, GPU-hours, disk, downloads; and checks that can be made before.

Rates are assumptions, stated with the numbers: an H100 makes ``PREFILL_FLOPS`` useful operations a second in passes over
whole sequences, and decodes ``DECODE_TOKENS`` tokens a second of a 1B model in large batches (inversely to its size).
A pass costs 2 operations per parameter and token forward, 6 with the backward pass.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tropd.pipeline.config.paper_tables import Setting
from tropd.pipeline.config.schema import Config
from tropd.pipeline.experiments.reproduce import Job, open_setting
from tropd.pipeline.models.tokenizers import check_tokenizers
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.storage.errors import TropdError
from tropd.storage.workspace import shown_path

PREFILL_FLOPS = 3.0e14
DECODE_TOKENS = 2.0e4
MEAN_LENGTH = 0.6
"""Assumed average length of responses, as a share of the longest."""
CACHE_BYTES = 95
"""Per token of the teacher cache (docs/cache.md)."""


@dataclass(frozen=True)
class StagePlan:
    """One line of the plan."""

    what: str
    command: str
    gpu_hours: float
    disk_bytes: float


@dataclass(frozen=True)
class SettingPlan:
    """The plan of one setting."""

    title: str
    stages: list[StagePlan]
    download_bytes: float
    checks: list[tuple[bool | None, str]]
    """True: holds; False: does not; None: could not be checked here."""


def plan_table(job: Job) -> Iterator[SettingPlan]:
    """Plan every setting; nothing is made but the workspaces with their configuration."""
    for setting in job.table.settings:
        run = open_setting(job, setting, SILENT)
        stages = list(_stages(job, setting, run))
        yield SettingPlan(
            title=setting.title,
            stages=stages,
            download_bytes=2e9 * (setting.student_billions + setting.teacher_billions) * (not job.rehearsal),
            checks=list(_checks(job, setting, run, sum(stage.disk_bytes for stage in stages))),
        )


def _stages(job: Job, setting: Setting, run: Run) -> Iterator[StagePlan]:
    config, where = run.config, f"-w {shlex.quote(shown_path(run.workspace.root))}"
    student, teacher = 1e9 * setting.student_billions, 1e9 * setting.teacher_billions
    length = MEAN_LENGTH * config.rollout.max_tokens
    prefixes = (config.data.limit or config.demo.train_problems) * config.prefixes.samples_per_prompt * length
    # The schedule starts with whole prefixes and ends with none: on average the student writes half of a response.
    tokens = config.train.steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt * length
    answers = sum(
        30 * part.samples * MEAN_LENGTH * (part.max_tokens or config.rollout.max_tokens)
        for part in config.evaluation_sets.values()
    )
    train = _decode(student, tokens / 2) + _passes(2 * teacher, tokens / 2) + _passes(6 * student, tokens)
    if config.demo.enabled:
        yield StagePlan("models and problems", f"tropd prepare {where}", 0.0, 1e7)
    else:
        yield StagePlan("problems", "(fetched from the Hugging Face hub)", 0.0, 5e8)
    yield StagePlan("prefixes", f"tropd generate-prefixes {where}", _decode(teacher, prefixes), 8 * prefixes)
    yield StagePlan(
        "scores", f"tropd score-teacher {where}", _passes(2 * teacher, prefixes), CACHE_BYTES * prefixes
    )
    if setting.sft_from is not None:
        steps = config.sft.steps * config.sft.prompts_per_step
        command = f"tropd sft {where} --from {setting.sft_from}"
        yield StagePlan("SFT", command, _passes(6 * student, steps * length), 2 * 12 * student + 2 * student)
    methods = ",".join(row.objective for row in setting.rows)
    runs = job.seeds * len(setting.rows)
    yield StagePlan(
        f"{runs} runs: train, evaluate",
        f"tropd compare {where} --objectives {shlex.quote(methods)} --seeds {job.seeds}",
        runs * (train + _decode(student, answers)) + _decode(student, answers) + _decode(teacher, answers),
        runs * (config.train.keep_checkpoints * 12 * student + 2 * student),
    )


def _decode(parameters: float, tokens: float) -> float:
    return tokens / (DECODE_TOKENS * 1e9 / parameters) / 3600


def _passes(flops_per_token: float, tokens: float) -> float:
    return flops_per_token * tokens / PREFILL_FLOPS / 3600


def _checks(job: Job, setting: Setting, run: Run, disk: float) -> Iterator[tuple[bool | None, str]]:
    free = shutil.disk_usage(job.root).free
    yield free > disk, f"disk: about {disk / 1e9:,.0f} GB needed, {free / 1e9:,.0f} GB free at {job.root}"
    yield True, f"names: recipe {setting.recipe!r}, {len(setting.rows)} objectives, all packaged"
    yield _tokenizers(run, setting)
    if job.rehearsal:
        return
    gpus = torch.cuda.device_count()
    yield (True, f"{gpus} GPUs") if gpus else (None, "GPUs: none here, so memory and vLLM were not checked")
    yield _hub(run.config, setting)


def _tokenizers(run: Run, setting: Setting) -> tuple[bool | None, str]:
    if run.config.demo.enabled:
        return True, "tokenizers: student and teacher are made with the same one"
    models = [setting.sft_from or run.config.student.model, run.config.teacher.model]
    if not all(run.workspace.resolve(model).exists() for model in models):
        return None, f"tokenizers: not compared, for {' and '.join(models)} are not on this machine"
    try:
        check_tokenizers(role_tokenizer(run, "student"), role_tokenizer(run, "teacher"))
    except TropdError as error:
        return False, f"tokenizers: {error.message}"
    return True, "tokenizers: student and teacher have the same"


def _hub(config: Config, setting: Setting) -> tuple[bool | None, str]:
    names = f"{setting.sft_from or config.student.model}, {config.teacher.model}, OpenThoughts3, AIME24, AIME25, AMC23"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None, f"hub: HF_HUB_OFFLINE is set, so it was not asked for {names}"
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return None, f"hub: no network, so it was not asked for {names}"
    return True, "hub: huggingface.co answers"
