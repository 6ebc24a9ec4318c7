"""One optimizer step's loss and gradient, from rows and the teacher's scores of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.models.runtime import to_device, to_host
from tropd.pipeline.objectives.estimators import LOGPROB_FLOOR, topk_reverse_kl
from tropd.pipeline.objectives.loss import (
    StepPlan,
    TokenBatch,
    check_alternatives,
    floored_log_ratio,
    plan_step,
    region_losses,
)
from tropd.pipeline.objectives.needs import needs_drawn, needs_student_pass, needs_student_tail
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.objectives.rewards.advantages import StepRewards
from tropd.pipeline.objectives.token_weight_specs import DIVERGENCE_WEIGHTS
from tropd.pipeline.objectives.token_weights import TokenStatistics
from tropd.pipeline.training.rollout.rows import Row, mu_logprobs, sampler_logprobs
from tropd.pipeline.training.signal.ask_teacher import TeacherData
from tropd.pipeline.training.update import dropout
from tropd.pipeline.training.update.forward import Measured, Passed, pass_idly, pass_through, with_drawn
from tropd.pipeline.training.update.micro_batches import Layout, MicroBatch, RaggedTopk, micro_batches
from tropd.pipeline.training.update.student import StudentPass, gathered_step
from tropd.pipeline.training.world import ALONE, World
from tropd.storage.arrays import Floats64

REGIONS = ("trust", "outlier", "guidance")


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite."""


@dataclass(frozen=True)
class StepInputs:
    """Everything that a step's loss depends on, besides the weights."""

    rows: Sequence[Row]
    teacher: TeacherData
    regions: Regions
    guidance_topk: RaggedTopk | None
    """Cached alternatives of the step's guidance tokens, where the objective learns from them."""
    reference_logprobs: npt.NDArray[np.float32] | None
    """``[T]`` log π_ref of the student's tokens, where the objective scales rewards."""
    progress: float
    """Share of the training steps done."""
    dropout_seed: int | None = None
    """Root seed of dropout, where the student trains with it."""
    rewards: StepRewards | None = None
    """Where the objective looks at rewards."""
    rows_without_reward: int = 0
    """Rows of the step that were left out, because they have none."""

    @cached_property
    def sampler_logprobs(self) -> Floats64:
        """``[T]`` (see ``rows``)."""
        return sampler_logprobs(self.rows)

    @cached_property
    def mu_logprobs(self) -> Floats64:
        """``[T]`` (see ``rows``)."""
        return mu_logprobs(self.rows)


@dataclass(frozen=True)
class StepOutcome:
    """Measurements of the step, per token of it; gradients are in the parameters."""

    losses: dict[str, float]
    """Loss per region."""
    supervised_tokens: int
    """How many tokens, student's and prefix, have a part in the loss."""
    student_logprobs: Floats64
    """``[T]``."""
    student_entropy: Floats64
    """``[T]``."""
    overlap: Floats64
    """``[T]`` share of the teacher's alternatives among the student's likeliest; NaN without alternatives."""
    student_topk_mass: Floats64
    """``[T]`` the student's mass on the teacher's alternatives; NaN without any."""
    region_gradient_norms: dict[str, float]
    """Norm of each region's own gradient, where asked for."""


def backpropagate(
    student: StudentPass,
    parameters: Sequence[torch.nn.Parameter],
    objective: Objective,
    inputs: StepInputs,
    *,
    micro_batch_tokens: int,
    region_gradients: bool = False,
    world: World = ALONE,
) -> StepOutcome:
    """Add the gradient of the step's loss to the parameters.

    The step is cut into micro-batches of at most ``micro_batch_tokens`` padded tokens, and these are shared out in
    ``world``; neither loss nor gradient depends on how.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    device = parameters[0].device
    layout = Layout(inputs.rows, objective.guides)
    share = (world.rank, world.size)
    batches = list(micro_batches(layout, micro_batch_tokens, device, share, packing=student.packing))
    rounds = max(world.gather(len(batches)))
    tail = needs_student_tail(objective)
    measured = Measured(len(inputs.teacher.teacher_logprobs))
    losses: list[Tensor] = []
    region_sums: dict[str, list[Tensor]] = {}
    with gathered_step(student, rounds) as begin_round:
        statistics = _statistics(student, objective, inputs, layout, batches, rounds, world)
        plan = plan_step(
            objective,
            inputs.regions,
            statistics,
            groups=layout.groups,
            guidance_rows=layout.guidance_rows,
            progress=inputs.progress,
        )
        check_alternatives(objective, plan, inputs.teacher.topk.index)
        for number, micro_batch in enumerate(batches):
            begin_round(number)
            _seed(inputs, world, number)
            passed = pass_through(student, micro_batch, inputs.teacher.topk, inputs.guidance_topk, tail=tail)
            batch = _token_batch(inputs, plan, micro_batch, passed)
            if needs_drawn(objective):
                batch = replace(batch, topk=with_drawn(passed, micro_batch))
            regions = region_losses(objective, batch)
            losses.append(torch.stack([regions[name].detach() for name in REGIONS]))
            if region_gradients:
                _add_region_gradients(regions, parameters, region_sums)
            # FSDP averages over processes; the loss is normalized over all of them, so its parts add up.
            (world.size * sum(regions.values(), start=torch.zeros((), device=device))).backward()
            _measure(measured, passed)
        for number in range(len(batches), rounds):
            begin_round(number)
            pass_idly(student, _shortest(layout, device)).backward()
    found = measured.fetch()
    return StepOutcome(
        losses=world.total(_finite_sums(losses)),
        supervised_tokens=_supervised(objective, plan),
        student_logprobs=world.merge(found["logprobs"]),
        student_entropy=world.merge(found["entropy"]),
        overlap=_overlap(inputs, world.merge(found["overlap"])),
        student_topk_mass=world.merge(found["mass"]),
        region_gradient_norms={
            name: float(torch.nn.utils.get_total_norm(sums)) for name, sums in region_sums.items()
        },
    )


def _finite_sums(losses: Sequence[Tensor]) -> dict[str, float]:
    """Sums of the micro-batches' losses by region, looked at once for the step.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    sums = dict.fromkeys(REGIONS, 0.0)
    for values in to_host(*losses):
        for name, value in zip(REGIONS, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"the loss of region {name!r} is {value}")
            sums[name] += value
    return sums


def _supervised(objective: Objective, plan: StepPlan) -> int:
    student = np.zeros(len(plan.trust), dtype=np.bool_)
    for region, coefficients in ((objective.trust, plan.trust), (objective.outlier, plan.outlier)):
        if region.loss.estimator != "zero":
            student |= coefficients != 0
    return int(student.sum() + np.count_nonzero(plan.guidance))


def _seed(inputs: StepInputs, world: World, micro_batch: int) -> None:
    """A micro-batch loses the same to dropout whenever it goes through the student in a step."""
    if inputs.dropout_seed is not None:
        dropout.seed(inputs.dropout_seed, world.rank, micro_batch)


def _shortest(layout: Layout, device: torch.device) -> MicroBatch:
    """The shortest row with supervised tokens alone, for passes without effect."""
    counts = layout.student_counts + layout.guidance_counts
    rows = [row for row, count in zip(layout.rows, counts, strict=True) if count]
    shortest = min(rows, key=lambda row: len(row.sequence))
    return next(iter(micro_batches(Layout([shortest], layout.guided), 1, device)))


def _token_batch(inputs: StepInputs, plan: StepPlan, micro_batch: MicroBatch, passed: Passed) -> TokenBatch:
    output = passed.output
    device, dtype = output.targets.device, output.targets.dtype
    students, prefixes = micro_batch.student_tokens, micro_batch.guidance_tokens

    def tensor(values: Any, index: npt.NDArray[np.int64]) -> Tensor:
        return to_device(np.asarray(values)[index], device).to(dtype)

    def optional(values: Any) -> Tensor | None:
        return None if values is None else tensor(values, students)

    return TokenBatch(
        student_logprobs=output.targets[passed.students],
        teacher_logprobs=tensor(inputs.teacher.teacher_logprobs, students),
        mu_logprobs=tensor(inputs.mu_logprobs, students),
        trust=tensor(plan.trust, students),
        outlier=tensor(plan.outlier, students),
        guidance=tensor(plan.guidance, prefixes),
        trust_used=to_device(np.flatnonzero(plan.trust[students]), device),
        outlier_used=to_device(np.flatnonzero(plan.outlier[students]), device),
        guidance_logprobs=output.targets[passed.prefixes],
        trust_advantages=optional(plan.trust_advantages),
        outlier_advantages=optional(plan.outlier_advantages),
        reward_advantages=optional(plan.reward_advantages),
        reference_logprobs=optional(inputs.reference_logprobs),
        topk_index=to_device(passed.topk.index, device),
        topk=passed.alternatives,
        guidance_topk=passed.guidance,
    )


def _measure(measured: Measured, passed: Passed) -> None:
    output, tokens, topk = passed.output, passed.tokens, passed.alternatives
    measured.add("logprobs", tokens, output.targets[passed.students])
    measured.add("entropy", tokens, output.entropy[passed.students])
    measured.add("overlap", tokens, output.overlap[passed.students])
    if len(passed.topk.index):
        measured.add("mass", tokens[passed.topk.index], topk.sum(topk.student_logprobs.detach().exp()))


def _statistics(
    student: StudentPass,
    objective: Objective,
    inputs: StepInputs,
    layout: Layout,
    batches: Sequence[MicroBatch],
    rounds: int,
    world: World,
) -> TokenStatistics:
    """Statistics of all T tokens that token weights depend on; those of the student cost a pass without gradient."""
    advantages = floored_log_ratio(
        inputs.teacher.teacher_logprobs, inputs.sampler_logprobs.astype(np.float32)
    )
    reference, gain = inputs.reference_logprobs, None
    if reference is not None:
        floored = np.maximum(reference, np.float32(LOGPROB_FLOOR))
        gain = floored_log_ratio(inputs.teacher.teacher_logprobs, floored)
    known = TokenStatistics(
        rows=layout.student_rows,
        advantages=advantages,
        gain=gain,
        student_logprobs=inputs.sampler_logprobs,
        rewards=inputs.rewards,
        teacher_entropy=None if inputs.teacher.entropy is None else inputs.teacher.entropy.astype(np.float64),
        teacher_mass=_teacher_mass(inputs),
    )
    if not needs_student_pass(objective):
        return known
    diverges = any(weight.kind in DIVERGENCE_WEIGHTS for weight in objective.token_weights)
    device = next(student.parameters()).device
    measured = Measured(len(advantages))
    with torch.no_grad():
        for number, micro_batch in enumerate(batches):
            _seed(inputs, world, number)
            passed = pass_through(
                student, micro_batch, inputs.teacher.topk, inputs.guidance_topk, tail=diverges
            )
            measured.add("entropy", passed.tokens, passed.output.entropy[passed.students])
            measured.add("overlap", passed.tokens, passed.output.overlap[passed.students])
            measured.add("divergence", passed.tokens, torch.zeros_like(passed.students))
            if diverges:
                divergence = topk_reverse_kl(passed.alternatives)
                measured.add("divergence", passed.tokens[passed.topk.index], divergence)
        for _ in range(len(batches), rounds):
            pass_idly(student, _shortest(layout, device))
    found = measured.fetch()
    merged = {name: world.merge(found[name]) for name in ("entropy", "divergence", "overlap")}
    return replace(
        known,
        student_entropy=merged["entropy"],
        divergence=merged["divergence"],
        overlap=_overlap(inputs, merged["overlap"]),
    )


def _teacher_mass(inputs: StepInputs) -> Floats64:
    """``[T]`` the teacher's probability of all alternatives of a token; 0 without any."""
    mass = np.zeros(len(inputs.teacher.teacher_logprobs))
    mass[inputs.teacher.topk.index] = -np.expm1(np.minimum(inputs.teacher.topk.tail.astype(np.float64), 0.0))
    return mass


def _overlap(inputs: StepInputs, among_students: Floats64) -> Floats64:
    """``[T]`` share of the alternatives on which both sides agree: of the teacher's, those among the student's likeliest;
    of the student's, as the teacher says (NaN where it was not asked)."""
    if inputs.teacher.overlap is not None:
        return inputs.teacher.overlap.astype(np.float64)
    chosen = any(row.chosen_ids is not None for row in inputs.rows)
    return np.full(len(among_students), np.nan) if chosen else among_students


def _add_region_gradients(
    regions: Any, parameters: Sequence[torch.nn.Parameter], sums: dict[str, list[Tensor]]
) -> None:
    for name, value in regions.items():
        found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        old = sums.get(name)
        sums[name] = list(found) if old is None else [a + b for a, b in zip(old, found, strict=True)]
