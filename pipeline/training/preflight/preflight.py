"""The preflight of a run: sizes from configuration files, prompts, this machine; refused is what cannot work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tropd.pipeline.config.schema import Config
from tropd.pipeline.run.automatic import settled
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.memory_plan import GPU_BYTES, MemoryPart, ModelShape, disk_bytes, shape_of
from tropd.pipeline.training.preflight.checks import (
    Check,
    check_machine,
    check_teacher_stages,
    check_training,
    refuse_plan,
)
from tropd.pipeline.training.preflight.machine import Machine, look_at_machine
from tropd.pipeline.training.preflight.needs import PROMPT, Needs
from tropd.pipeline.training.preflight.step_time import StepTime
from tropd.storage.errors import TropdError

NODE_GPUS = 8
"""Planned for where no number is given and none is here."""


@dataclass(frozen=True)
class RunPlan:
    """The needs of a run, and the checks of them."""

    needs: Needs | None
    """None where the models' sizes are not known."""
    disk: dict[str, float]
    checks: list[Check]

    @property
    def memory(self) -> dict[str, list[MemoryPart]]:
        """Parts of training's memory, by the GPUs that have them."""
        return {} if self.needs is None else self.needs.training()

    @property
    def step(self) -> StepTime | None:
        """A predicted step, where it runs on GPUs."""
        return None if self.needs is None or self.needs.on_cpu else self.needs.step()


def plan_run(
    run: Run,
    gpus: int,
    *,
    gpu_bytes: float | None = None,
    prompts: Sequence[Sequence[int]] = (),
    sizes: tuple[ModelShape, ModelShape] | None = None,
    machine: Machine | None = None,
    runs_here: bool = False,
) -> RunPlan:
    """Plan a run on this many GPUs. Of hub models only configuration files are fetched, never weights.

    Args:
        gpu_bytes: memory of each; if not given, that of those here.
        prompts: as token ids, where they are known.
        sizes: of student and teacher where their configurations cannot be read, which is said then.
        machine: another one than this.
        runs_here: see ``check_machine``.
    """
    machine = machine or look_at_machine(run.workspace.root, gpus=not runs_on_cpu(run, gpus, gpu_bytes))
    needs, checks = needs_of(run, gpus, gpu_bytes=gpu_bytes, prompts=prompts, sizes=sizes, machine=machine)
    if needs is None:
        return RunPlan(None, {}, checks)
    disk = disk_bytes(needs.config, needs.student)
    checks += check_machine(needs, machine, disk=sum(disk.values()), runs_here=runs_here)
    return RunPlan(
        needs, disk, [*checks, *check_teacher_stages(needs, machine), *check_training(needs, machine)]
    )


def needs_of(
    run: Run,
    gpus: int,
    *,
    machine: Machine,
    gpu_bytes: float | None = None,
    prompts: Sequence[Sequence[int]] = (),
    sizes: tuple[ModelShape, ModelShape] | None = None,
) -> tuple[Needs | None, list[Check]]:
    """The needs of a run (see ``plan_run``), None where its models' sizes are not known; and what was not read."""
    config = config_on(run, runs_on_cpu(run, gpus, gpu_bytes))
    found, checks = _sizes(run, config, sizes)
    if found is None:
        return None, checks
    gpu_bytes = gpu_bytes or _device_bytes(config, machine, gpus)
    longest = max(map(len, prompts), default=PROMPT)
    return Needs(config, gpus, *found, longest, gpu_bytes=gpu_bytes), checks


def visible_gpus(run: Run) -> int:
    """GPUs that a run would use here; 1 on a CPU."""
    return 1 if run.config.runtime.device == "cpu" else max(1, torch.cuda.device_count())


def gpus_to_plan() -> int:
    """GPUs to plan a table for: those here, or a node's."""
    return torch.cuda.device_count() or NODE_GPUS


def runs_on_cpu(run: Run, gpus: int, gpu_bytes: float | None = None) -> bool:
    """Whether a plan is for a CPU: where that is set, or no GPU is here and none is spoken of."""
    device = run.resolved.config.runtime.device
    spoken_of = gpus > 1 or gpu_bytes is not None or torch.cuda.is_available()
    return device == "cpu" or (device == "auto" and not spoken_of)


def config_on(run: Run, on_cpu: bool) -> Config:
    """The run's configuration with automatic settings decided for that device, which need not be here."""
    asked = run.resolved.config
    runtime = asked.runtime.model_copy(update={"device": "cpu" if on_cpu else "cuda"})
    return settled(run.workspace, asked.model_copy(update={"runtime": runtime}), run.resolved.origins)


def _sizes(
    run: Run, config: Config, known: tuple[ModelShape, ModelShape] | None
) -> tuple[tuple[ModelShape, ModelShape] | None, list[Check]]:
    """Shapes of student and teacher. A teacher that is served elsewhere may be unknown: it is taken for the student."""
    found: list[ModelShape] = []
    checks = []
    for number, role in enumerate(("student", "teacher")):
        try:
            found.append(shape_of(run, role))
        except TropdError as error:
            why = f"{role}.model = {getattr(config, role).model!r}: its config.json is not here, and cannot be fetched"
            if known is not None:
                found.append(known[number])
                text = f"{why}: sizes are those of the table"
            elif role == "teacher" and config.teacher.urls:
                found.append(found[0])
                text = (
                    "the teacher's config.json is not here: its part of a step's time is that of the student"
                )
            else:
                text = f"{error.message}: memory, disk and time were not checked"
                return None, [Check(None, " ".join(text.split()))]
            checks.append(Check(None, " ".join(text.split())))
    return (found[0], found[1]), checks


def require_room(run: Run, processes: int, longest_prompt: int, machine: Machine | None = None) -> None:
    """Refuse a training run that does not fit this machine even with short responses; warn where long ones would not.

    Args:
        processes: that train together.
        longest_prompt: in tokens.

    Raises:
        ConfigError: with the numbers, and the settings to change.
    """
    machine = machine or look_at_machine(run.workspace.root, gpus=not runs_on_cpu(run, 1))
    needs = _needs_here(run, processes, longest_prompt, machine)
    if needs is None:
        return
    written = disk_bytes(needs.config, needs.student)
    disk = max(
        0.0, written["checkpoints"] + written["final student"] - _bytes_in(run.workspace.stage("train"))
    )
    refuse_plan(_checks(needs.with_short_responses(), machine, disk), "training")
    for check in _checks(needs, machine, disk):
        if check.holds is False:
            run.reporter.warning(f"train: if responses get as long as they may: {check.what}")


def gathers_once(run: Run, processes: int, longest_prompt: int) -> bool:
    """Whether this machine has room for whole weights and gradients in a step; from sizes alone, so a resumed run
    decides the same. False where they are not known.

    Args:
        processes, longest_prompt: see ``require_room``.
    """
    machine = look_at_machine(run.workspace.root, gpus=not runs_on_cpu(run, 1))
    needs = _needs_here(run, processes, longest_prompt, machine)
    return needs is not None and needs.gathers_once


def _needs_here(run: Run, processes: int, longest_prompt: int, machine: Machine) -> Needs | None:
    """The needs of training on this machine and others like it; None where the models' sizes are not known."""
    config = config_on(run, runs_on_cpu(run, 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    found, _ = _sizes(run, config, None)
    if found is None:
        return None
    gpu_bytes = _device_bytes(config, machine, here)
    return Needs(
        config, processes, *found, longest_prompt, machines=max(1, processes // here), gpu_bytes=gpu_bytes
    )


def _device_bytes(config: Config, machine: Machine, processes: int) -> float:
    if config.runtime.device == "cpu":
        return machine.memory / processes
    return min((gpu.total for gpu in machine.gpus), default=GPU_BYTES)


def _checks(needs: Needs, machine: Machine, disk: float) -> list[Check]:
    return [*check_machine(needs, machine, disk=disk, runs_here=True), *check_training(needs, machine)]


def _bytes_in(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
