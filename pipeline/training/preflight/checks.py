"""Checks of a run's needs against a machine: each holds, does not, or cannot be made here; and says it in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tropd.pipeline.training.memory_plan import MemoryPart, peak_bytes
from tropd.pipeline.training.preflight.machine import Gpu, Machine
from tropd.pipeline.training.preflight.needs import VLLM_BESIDE, Needs
from tropd.storage.errors import ConfigError

MARGIN = 1.5
"""A deadline is at least so many times the predicted time."""
TAKEN = 2e9
"""Of a GPU's memory, in use before anything starts: more than that is another process."""
START_SECONDS, READ_BYTES = 600.0, 1e9
"""Time in which a local teacher has to be ready, and a disk's bytes per second."""


@dataclass(frozen=True)
class Check:
    """An answer, and the numbers and the setting behind it."""

    holds: bool | None
    """None: it could not be checked here."""
    what: str


def check_machine(needs: Needs, machine: Machine, *, disk: float, runs_here: bool) -> list[Check]:
    """Check devices, main memory, shared memory and disk.

    Args:
        machine: on which it would run, or another one: then what that lacks counts as not checked.
        disk: bytes that will be written.
        runs_here: this is not a plan for another machine: GPUs that are not there count.
    """
    found = [*_devices(needs, machine, runs_here)]
    here = runs_here or needs.on_cpu or len(machine.gpus) >= needs.here
    general = (_host(needs, machine), _shared(needs, machine), check_disk(disk, machine))
    return [*found, *(check if here else elsewhere(check) for check in general)]


def check_teacher_stages(needs: Needs, machine: Machine) -> list[Check]:
    """Check a GPU's memory while the teacher writes and scores."""
    if needs.on_cpu:
        return []
    each = "each GPU" if needs.gpus > 1 else "the GPU"
    free = [gpu.free for gpu in _used(needs, machine)]
    found = [
        _fits("generate-prefixes", each, needs.prefixes(), needs, free),
        _fits("score-teacher", each, needs.scores(), needs, free),
    ]
    in_vllm = "vllm" in (needs.config.teacher.engine, needs.config.teacher.scorer)
    return [*found, *([_in_vllm(needs)] if in_vllm else [])]


def check_training(needs: Needs, machine: Machine) -> list[Check]:
    """Check the GPUs' memory while training, and its deadlines."""
    if needs.on_cpu:
        return []
    gpus = _used(needs, machine)
    found = []
    for number, (where, parts) in enumerate(needs.training().items()):
        own = gpus[number : number + 1] if where == "GPU 0" else gpus[number:]
        found.append(_fits("train", where, parts, needs, [gpu.free for gpu in own]))
    return [*found, *_deadlines(needs)]


def elsewhere(check: Check) -> Check:
    """A check of this machine for a run on another one: its answer does not count."""
    return (
        check
        if check.holds
        else Check(None, f"{check.what}; but this is not the machine that is planned for")
    )


def refuse_plan(checks: Iterable[Check], what: str) -> None:
    """Raise where a check does not hold.

    Raises:
        ConfigError: with a line for each.
    """
    wrong = [check.what for check in checks if check.holds is False]
    if wrong:
        raise ConfigError(
            "\n    ".join([f"{what} cannot be made here:", *wrong]), hint="tropd plan shows all needs"
        )


def _devices(needs: Needs, machine: Machine, runs_here: bool) -> Iterator[Check]:
    if needs.on_cpu:
        return
    there, wanted = len(machine.gpus), needs.here
    if there < wanted:
        shown = ", ".join(gpu.name for gpu in machine.gpus) or "none"
        if runs_here:
            fix = (
                f"--gpus {there} takes these"
                if there
                else 'set runtime.device = "cpu", or run it where they are'
            )
            yield Check(False, f"GPUs: {wanted} are needed, {there} visible ({shown}); {fix}")
        else:
            known = f"{needs.gpu_bytes / 1e9:.0f} GB each are assumed"
            yield Check(None, f"GPUs: planned for {wanted}, here are {there} ({shown}); {known}")
    else:
        more = f"; --gpus {there} uses all" if there > wanted else ""
        yield Check(True, f"GPUs: {wanted} of {there} ({machine.gpus[0].name}){more}")
    for number, gpu in enumerate(machine.gpus[:wanted]):
        if gpu.total - gpu.free > TAKEN:
            yield Check(
                None,
                f"GPU {number} ({gpu.name}): other processes have {_gb(gpu.total - gpu.free)} of {_gb(gpu.total)}; "
                "end them, or leave it out (CUDA_VISIBLE_DEVICES)",
            )


def _used(needs: Needs, machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs of a machine that has enough of them."""
    return machine.gpus[: needs.here] if len(machine.gpus) >= needs.here else ()


def _fits(stage: str, where: str, parts: Sequence[MemoryPart], needs: Needs, free: Sequence[float]) -> Check:
    most, needed = min(free, default=needs.gpu_bytes), peak_bytes(parts)
    text = f"{stage}: at most {_gb(needed)} on {where}, {_gb(most)} {'free' if free else 'there'}"
    if needed <= most:
        return Check(True, text)
    return Check(False, f"{text}; {largest_parts(parts)}")


def largest_parts(parts: Sequence[MemoryPart]) -> str:
    """The largest parts that a setting makes smaller, with it."""
    largest = sorted((part for part in parts if part.smaller), key=lambda part: -part.bytes)[:3]
    return "; ".join(f"{part.name} ({_gb(part.bytes)}): {part.smaller}" for part in largest)


def _in_vllm(needs: Needs) -> Check:
    settings = needs.config.vllm
    share = settings.gpu_memory_utilization * needs.gpu_bytes
    weights = 2.0 * needs.teacher.parameters / settings.tensor_parallel_size
    if settings.quantization is not None:
        weights /= 2
    needed = weights + VLLM_BESIDE
    text = f"the teacher in vLLM: {_gb(needed)} of weights and buffers in a share of {_gb(share)} of each GPU"
    if needed <= share:
        return Check(True, text)
    return Check(
        False,
        f"{text}; raise vllm.tensor_parallel_size or vllm.gpu_memory_utilization, or set vllm.quantization",
    )


def _host(needs: Needs, machine: Machine) -> Check:
    needed = needs.host_bytes()
    processes = f"{needs.here} process{'es' if needs.here > 1 else ''}"
    text = f"main memory: at most {_gb(needed)} for {processes} and the teacher, {_gb(machine.memory)} there"
    if needed <= machine.memory:
        return Check(True, text)
    if needs.on_cpu:
        return Check(False, f"{text}; {largest_parts(next(iter(needs.training().values())))}")
    return Check(False, f"{text}; take fewer GPUs (--gpus), or serve the teacher elsewhere (teacher.url)")


def _shared(needs: Needs, machine: Machine) -> Check:
    needed = needs.shared_bytes(hands_over=machine.hands_over)
    if not needed:
        return Check(True, "/dev/shm: not needed")
    if machine.shared_memory is None:
        return Check(None, f"/dev/shm: {_gb(needed)} needed; there is no such place here")
    text = f"/dev/shm: {_gb(needed)} needed, {_gb(machine.shared_memory)} free"
    if needed <= machine.shared_memory:
        return Check(True, text)
    wider = f"start the container with --shm-size={needed / 1e9 + 1:.0f}g"
    return Check(
        False,
        f"{text}; {wider}" + (", or set train.max_staleness = 0" if needs.config.train.max_staleness else ""),
    )


def check_disk(needed: float, machine: Machine) -> Check:
    """Whether a run's output has room."""
    text = f"disk: at most {_gb(needed)} needed, {_gb(machine.disk)} free"
    if needed <= machine.disk:
        return Check(True, text)
    return Check(False, f"{text}; lower train.keep_checkpoints or data.limit, or take another place (-w)")


def _deadlines(needs: Needs) -> Iterator[Check]:
    """From the rates of an H100: another GPU is hardly faster."""
    teacher = needs.config.teacher
    if needs.asks:
        predicted, given = needs.longest_answer(), teacher.timeout_seconds
        text = f"teacher.timeout_seconds = {given:.0f}: the largest request is predicted to take {predicted:.0f} s"
        if given >= MARGIN * predicted:
            yield Check(True, text)
        else:
            yield Check(
                False,
                f"{text}; set it to {MARGIN * predicted:.0f} or more, or lower service.max_request_tokens",
            )
    if needs.config.student.engine == "vllm":
        predicted, given = needs.step().rollout, needs.config.vllm.answer_seconds
        text = f"vllm.answer_seconds = {given:.0f}: the responses of a step are predicted within {predicted:.0f} s"
        enough = given >= MARGIN * predicted
        yield Check(enough, text if enough else f"{text}; set it to {MARGIN * predicted:.0f} or more")
    if needs.teachers:
        seconds = 2.0 * needs.teacher.parameters / READ_BYTES
        text = f"a local teacher has {START_SECONDS:.0f} s to start: reading it takes about {seconds:.0f} s"
        yield (
            Check(True, text)
            if MARGIN * seconds <= START_SECONDS
            else Check(False, f"{text}; start it before, with tropd serve-teacher (teacher.url)")
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
