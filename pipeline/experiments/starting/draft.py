"""The configuration that fits a user's models, prompts and machine: a few settings, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch

from tropd.pipeline.config.resolve import parse_assignment, parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import LoraSettings
from tropd.pipeline.experiments.starting.fields import answers_of, grading_in
from tropd.pipeline.experiments.starting.holdout import record_lines, repeated, split
from tropd.pipeline.experiments.starting.look import (
    Data,
    Lengths,
    Models,
    count_tokens,
    free_memory,
    look_at_data,
    look_at_models,
)
from tropd.pipeline.objectives.needs import learns_by_comparison_alone
from tropd.pipeline.run.progress import Reporter
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.memory_plan import ModelShape, memory_parts, peak_bytes
from tropd.pipeline.training.time_plan import (
    Amounts,
    Rates,
    measure_rates,
    rounded_duration,
    seconds_of_stages,
)
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace

TRAIN_FILE, EVALUATION_FILE = "data/train.jsonl", "data/eval.jsonl"
HELD_OUT, ENOUGH = 0.1, 16
"""Share of the prompts that is held out; of few prompts up to a quarter, for an interval that says something."""
MOST_HELD_OUT = {"cuda": 500, "cpu": 64}
STEPS = {"cuda": 200, "cpu": 100}
PASSES = 5
"""Most times that a prompt is trained on."""
LEAST_STEPS = 20
LEAST_CHECKPOINTS = 10
GROUP = 4
"""Responses to a prompt whose rewards are compared, on a CPU."""
CPU_ROWS = 16
"""Prompts of a step on a CPU, with one response each."""
UNKNOWN_LENGTH = {"cuda": 2048, "cpu": 256}
"""Longest response where nothing suggests one."""
LONGEST = 8096
"""The paper's longest response."""
WORKED = 16
"""Tokens of a reference answer that is more than a result."""
LEARNING_RATES = ((20e6, 3e-4), (400e6, 5e-5), (1e9, 1e-5), (math.inf, 5e-6))
"""Largest number of parameters → learning rate: of the tiny demo, of SmolLM2-135M, and the paper's from 1.5B on."""
LORA_FACTOR = 10
MEASURED_BYTES = 4e9
"""Weights of larger models take too long to load for a measurement of seconds on a CPU."""
MEMORY_SHARE = 0.9
SMALLER: Sequence[Mapping[str, Any]] = (
    {"rollout.batch_size": 16},
    {"train.micro_batch_tokens": 1024},
    {"train.gradient_checkpointing": True},
    {"rollout.batch_size": 4},
    {"student.lora": LoraSettings().model_dump()},
)
"""Settings given up, one after another, until a run fits into memory."""


@dataclass(frozen=True)
class Request:
    """A user's request."""

    workspace: Workspace
    teacher: str
    student: str
    prompts: Path
    evaluation: Path | None = None
    objective: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    assignments: tuple[str, ...] = ()
    """Settings that are decided already, as ``section.field=value``."""
    measures: bool = True


@dataclass(frozen=True)
class ConfigLine:
    """One line of the configuration."""

    path: str
    value: Any
    why: str


@dataclass
class Draft:
    """The configuration to write, and notes on it."""

    given: Mapping[str, Any]
    choices: list[ConfigLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Path in the workspace → text."""

    def choose(self, path: str, value: Any, why: str) -> Any:
        """Settle a field: as it was given, or as chosen. Defaults are not written."""
        if path in self.given:
            return self.given[path]
        self.choices = [choice for choice in self.choices if choice.path != path]
        if value != _default(path):
            self.choices.append(ConfigLine(path, value, why))
        return value

    def text(self) -> str:
        """``config.toml``."""
        chosen = [*self.choices, *(ConfigLine(path, value, "as given") for path, value in self.given.items())]
        sections: dict[str, list[str]] = {name: [] for name in Config.model_fields}
        for choice in chosen:
            section, _, name = choice.path.partition(".")
            line = f"{name} = {_toml(choice.value)}"
            sections.setdefault(section, []).append(f"{line:<36}  # {' '.join(choice.why.split())}")
        head = "# Differences from the defaults, and why; tropd config explain FIELD explains a field.\n"
        return head + "".join(
            f"\n[{name}]\n" + "".join(f"{line}\n" for line in lines)
            for name, lines in sections.items()
            if lines
        )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    return str(tomlkit.item(value).as_string())


def _default(path: str) -> Any:
    value: Any = parse_config('[objective]\nname = "tropd"').config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def draft_run(request: Request, reporter: Reporter) -> Draft:
    """Look at everything, and decide; nothing is written.

    Raises:
        ConfigError, DataError: unusable models or prompts, or invalid settings.
    """
    draft = Draft(dict(_given(assignment) for assignment in request.assignments))
    given = draft.given
    workspace = request.workspace
    models = look_at_models(workspace, request.teacher, request.student, given.get("data.chat"))
    draft.choose("teacher.model", request.teacher, f"{_size(models.teacher)} parameters")
    draft.choose("student.model", request.student, f"{_size(models.student)} parameters")
    if request.objective is not None:
        draft.choose("objective.name", request.objective, "as asked for")
    draft.choose("data.chat", models.chat, "the tokenizer has a chat template")
    device = _device(draft)
    data, lengths, problems = _choose_data(draft, request, models, device)
    if lengths.date is not None:
        draft.choose("data.template_date", lengths.date.isoformat(), "the chat template writes this date")
    rates = _measured(request, draft, models, lengths, device, reporter)
    _choose_sizes(draft, models, data, lengths, rates, device)
    _fit_memory(draft, models, lengths, device)
    run = _opened(request, draft, reporter)
    _tell(draft, run.config, models, rates, Amounts(len(data.prompts), problems, lengths.mean), device)
    return draft


def _given(assignment: str) -> tuple[str, Any]:
    """Path and value of ``section.field=value``."""
    value: Any = parse_assignment(assignment)
    path = []
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        path.append(name)
        if len(path) == 1 + assignment.partition("=")[0].count("."):
            break
    return ".".join(path), value


def _size(shape: ModelShape) -> str:
    return f"{shape.parameters / 1e9:.1f}B" if shape.parameters >= 1e9 else f"{shape.parameters / 1e6:.3g}M"


def _device(draft: Draft) -> str:
    asked = draft.given.get("runtime.device", "auto")
    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def _opened(request: Request, draft: Draft, reporter: Reporter) -> Run:
    return Run(request.workspace, parse_config(draft.text(), where="config.toml"), reporter)


def _choose_data(draft: Draft, request: Request, models: Models, device: str) -> tuple[Data, Lengths, int]:
    """Settings of prompts and problems: their files, reading and grading; also the lengths of all prompts of that file,
    and the number of problems."""
    names = request.prompt_field, request.answer_field
    template = draft.given.get("data.template", "{prompt}")
    skip_bad = bool(draft.given.get("data.skip_bad", False))
    data = look_at_data(request.prompts, models.chat, template, *names, skip_bad=skip_bad)
    graded, lengths = data, count_tokens(data, models, skip_bad=skip_bad)
    if request.evaluation is not None:
        graded = look_at_data(request.evaluation, models.chat, template, *names, skip_bad=skip_bad)
        if graded.fields.prompt != data.fields.prompt:
            raise ConfigError(
                f"the prompt is in {data.fields.prompt!r} in {data.path}, but in {graded.fields.prompt!r} in "
                f"{graded.path}",
                hint="name one that both have with --prompt-field, or rename it in one of the files",
            )
        count_tokens(graded, models, skip_bad=skip_bad)
        num_problems = len(graded.prompts)
        draft.choose("data.prompts", str(data.path), f"{len(data.prompts):,} prompts")
        draft.choose("data.evaluation", str(graded.path), f"{num_problems:,} problems")
        if again := repeated(graded.prompts, data.prompts):
            draft.notes.append(
                f"data: {again} of {num_problems:,} problems are also trained on; see tropd contamination"
            )
    else:
        total = len(data.prompts)
        held_out = min(MOST_HELD_OUT[device], max(1, round(HELD_OUT * total), min(ENOUGH, total // 4)))
        seed = int(draft.given.get("run.seed", 0))
        trained, held = split(data.prompts, held_out, seed, data.path)
        draft.files[TRAIN_FILE] = record_lines(data.path, trained)
        draft.files[EVALUATION_FILE] = record_lines(data.path, held)
        num_problems = len(held)
        by_line = {prompt.line: prompt for prompt in data.prompts}
        data = replace(data, prompts=[by_line[line] for line in trained])
        draft.notes.append(
            f"data: {num_problems} of {len(by_line):,} prompts of {data.path} are held out for evaluation, at random, "
            f"and none of them is trained on in another record ({TRAIN_FILE}, {EVALUATION_FILE})"
        )
    if data.left_out:
        draft.notes.append(f"data: bad records of {data.path} that are left out: {data.left_out}")
    others = f" (also there: {', '.join(data.fields.others)})" if data.fields.others else ""
    draft.choose("data.prompt_field", data.fields.prompt, f"the field that holds the prompts{others}")
    if others:
        draft.notes.append(
            f"prompts are taken from {data.fields.prompt!r}{others}: --prompt-field names another"
        )
    grading = grading_in(graded.records, graded.fields)
    if grading.grader is None:
        if graded.fields.answer is not None:
            draft.choose("data.answer_field", "", grading.reason)
    else:
        draft.choose("data.answer_field", graded.fields.answer, "the field that holds the answers")
        draft.choose("evaluation.grader", grading.grader, grading.reason)
    draft.notes.append(f"grader: {grading.grader or 'none'}: {grading.reason}")
    return data, lengths, num_problems


def _measured(
    request: Request, draft: Draft, models: Models, lengths: Lengths, device: str, reporter: Reporter
) -> Rates | None:
    """Rates and lengths of this machine's own; None, with a word, without a measurement."""
    size = 4.0 * max(models.teacher.parameters, models.student.parameters)
    if not request.measures:
        draft.notes.append("time: not measured, as asked for")
    elif not models.here:
        draft.notes.append("time: not measured, for the weights are not on this machine yet")
    elif device == "cpu" and size > MEASURED_BYTES:
        draft.notes.append(
            f"time: not measured, for loading {size / 1e9:.0f} GB on a CPU takes long; tropd plan --time does it"
        )
    else:
        draft.choose("rollout.max_tokens", response_room(models, lengths), "")
        with reporter.waiting("measuring: the teacher answers a few prompts, the student trains once"):
            return measure_rates(_opened(request, draft, reporter), lengths.encoded)
    return None


def response_room(models: Models, lengths: Lengths) -> int:
    """Most tokens that a response may have.

    Raises:
        ConfigError: none.
    """
    room = models.context - lengths.longest
    if room < 1:
        raise ConfigError(
            f"the longest prompt has {lengths.longest} tokens, which leaves no room for a response: the models take "
            f"{models.context}",
            hint="leave long prompts out of the file, or take models with a longer context",
        )
    return min(LONGEST, room)


def _choose_sizes(
    draft: Draft, models: Models, data: Data, lengths: Lengths, rates: Rates | None, device: str
) -> None:
    most, why = _response_length(models, data, lengths, rates, device)
    draft.choose("rollout.max_tokens", most, why)
    rows, samples = (CPU_ROWS, 1) if device == "cpu" else (128, 4)
    why = "more prompts teach more than more responses to one"
    if samples == 1 and learns_by_comparison_alone(parse_config(draft.text()).config.objective):
        rows, samples = CPU_ROWS // GROUP, GROUP
        why = "a reward is compared with those of other responses to the prompt"
    per_step = draft.choose(
        "rollout.prompts_per_step",
        min(rows, len(data.prompts)),
        "fewer than the default 128, for a CPU" if rows <= len(data.prompts) else "all prompts in each step",
    )
    draft.choose("rollout.samples_per_prompt", samples, why)
    passes = math.ceil(PASSES * len(data.prompts) / per_step)
    reason = f"{PASSES} passes over the prompts" if passes < STEPS[device] else "half the default, for a CPU"
    if passes < LEAST_STEPS:
        reason = f"few prompts: {LEAST_STEPS * per_step / len(data.prompts):.0f} passes over them"
    steps = draft.choose("train.steps", min(STEPS[device], max(LEAST_STEPS, passes)), reason)
    every = min(_default("train.checkpoint_every"), max(1, int(steps) // LEAST_CHECKPOINTS))
    draft.choose("train.checkpoint_every", every, "a run that is stopped loses little")
    needed = steps * per_step
    if needed < len(data.prompts):
        draft.choose("data.limit", needed, f"{steps} steps of {per_step} prompts: each is seen once")
    rate = next(rate for size, rate in LEARNING_RATES if models.student.parameters <= size)
    draft.choose("train.learning_rate", rate, f"a start for {_size(models.student)} parameters")
    if device == "cpu":
        draft.choose("evaluation.batch_size", 32, "memory of a CPU")


def _response_length(
    models: Models, data: Data, lengths: Lengths, rates: Rates | None, device: str
) -> tuple[int, str]:
    """Longest response, and the reason."""
    room = response_room(models, lengths)
    answers = answers_of(data.records, data.fields.answer)
    counted = [len(models.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers[:500]]
    if counted and np.median(counted) >= WORKED:
        high = float(np.percentile(counted, 95))
        return min(
            room, _rounded(1.5 * high)
        ), f"95 % of the reference answers have at most {high:.0f} tokens"
    if rates is not None and rates.stopped:
        longest = max(rates.lengths)
        return min(room, _rounded(2 * longest)), f"the teacher's answers had at most {longest} tokens"
    most = UNKNOWN_LENGTH[device]
    if room <= most:
        return room, f"the models take {models.context} tokens, the longest prompt has {lengths.longest}"
    return most, "a start: longer responses are cut off, as the report then says"


def _rounded(length: float) -> int:
    return max(32, 32 * math.ceil(length / 32))


def _fit_memory(draft: Draft, models: Models, lengths: Lengths, device: str) -> None:
    """Give up speed, and at last full training, until the run fits into the memory that is free."""
    free = free_memory(device)

    def needed() -> float:
        config = parse_config(draft.text(), where="config.toml").config
        wide = {"dtype": "bfloat16" if device == "cuda" else "float32"}
        settled = {
            "teacher": config.teacher.model_copy(update=wide if config.teacher.dtype == "auto" else {}),
            "student": config.student.model_copy(update=wide if config.student.dtype == "auto" else {}),
            "runtime": config.runtime.model_copy(update={"device": device}),
        }
        parts = memory_parts(
            config.model_copy(update=settled),
            models.student,
            models.teacher,
            1,
            longest_prompt=lengths.longest,
        )
        return peak_bytes(parts)

    before = total = needed()
    for change in SMALLER:
        if total <= MEMORY_SHARE * free:
            break
        for path, value in change.items():
            draft.choose(path, value, f"needs {before / 1e9:.1f} GB, may use {MEMORY_SHARE * free / 1e9:.1f}")
        if "student.lora" in change and "train.learning_rate" not in draft.given:
            rate = next(c.value for c in draft.choices if c.path == "train.learning_rate")
            draft.choose("train.learning_rate", LORA_FACTOR * rate, "adapters learn with ten times the rate")
        total = needed()
    note = f"memory: about {total / 1e9:.1f} GB for training, {free / 1e9:.1f} GB are free"
    draft.notes.append(note if total <= free else f"{note}: it will hardly fit; tropd plan shows remedies")


def _tell(
    draft: Draft, config: Config, models: Models, rates: Rates | None, amounts: Amounts, device: str
) -> None:
    threads = config.runtime.threads or torch.get_num_threads()
    draft.notes.append(
        f"machine: {device}, {config.student.settled_dtype}"
        + (f", {threads} thread(s)" if device == "cpu" else "")
    )
    if rates is not None:
        seconds = seconds_of_stages(config, rates, amounts)
        shown = ", ".join(f"{name} {rounded_duration(value)}" for name, value in seconds.items())
        draft.notes.append(f"time, estimated from a measurement: {shown}")
