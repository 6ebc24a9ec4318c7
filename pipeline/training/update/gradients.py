"""One optimizer step's loss and gradient, from rows and the teacher's scores of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd.pipeline.models.output.logprobs import Lookups, TokenLogprobs
from tropd.pipeline.models.runtime import autocast
from tropd.pipeline.objectives.estimators import LOGPROB_FLOOR, Alternatives, topk_reverse_kl
from tropd.pipeline.objectives.loss import StepPlan, TokenBatch, floored_log_ratio, plan_step, region_losses
from tropd.pipeline.objectives.needs import needs_student_pass, needs_student_tail
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.objectives.token_weights import TokenStatistics
from tropd.pipeline.training.rollout.rows import Row, mu_logprobs, sampler_logprobs
from tropd.pipeline.training.signal.ask_teacher import TeacherData
from tropd.pipeline.training.update import dropout
from tropd.pipeline.training.update.micro_batches import Layout, MicroBatch, RaggedTopk, micro_batches
from tropd.pipeline.training.update.student import StudentPass
from tropd.pipeline.training.world import ALONE, World
from tropd.storage.arrays import Floats64


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
    statistics = _statistics(student, objective, inputs, layout, batches, rounds, world)
    plan = plan_step(
        objective,
        inputs.regions,
        statistics,
        groups=layout.groups,
        guidance_rows=layout.guidance_rows,
        progress=inputs.progress,
    )
    total = len(inputs.teacher.teacher_logprobs)
    measured = {name: np.full(total, np.nan) for name in ("logprobs", "entropy", "overlap", "mass")}
    losses = {"trust": 0.0, "outlier": 0.0, "guidance": 0.0}
    region_sums: dict[str, list[Tensor]] = {}
    for number, micro_batch in enumerate(batches):
        _seed(inputs, world, number)
        topk, guidance_topk, output = _forward(student, inputs, micro_batch, tail)
        batch = _token_batch(inputs, plan, micro_batch, topk, guidance_topk, output)
        regions = region_losses(objective, batch)
        for name, value in regions.items():
            if not bool(torch.isfinite(value)):
                raise NonFiniteError(f"the loss of region {name!r} is {float(value.detach())}")
            losses[name] += float(value.detach())
        if region_gradients:
            _add_region_gradients(regions, parameters, region_sums)
        # FSDP averages over processes; the loss is normalized over all of them, so its parts add up.
        (world.size * sum(regions.values(), start=torch.zeros((), device=device))).backward()
        _measure(measured, micro_batch, output, batch)
    for _ in range(len(batches), rounds):
        _idle(student, layout, device).backward()
    return StepOutcome(
        losses=world.total(losses),
        supervised_tokens=_supervised(objective, plan),
        student_logprobs=world.merge(measured["logprobs"]),
        student_entropy=world.merge(measured["entropy"]),
        overlap=world.merge(measured["overlap"]),
        student_topk_mass=world.merge(measured["mass"]),
        region_gradient_norms={
            name: float(torch.nn.utils.get_total_norm(sums)) for name, sums in region_sums.items()
        },
    )


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


def _idle(student: StudentPass, layout: Layout, device: torch.device) -> Tensor:
    """A pass without effect: others have one micro-batch more, and weights are gathered by all or none."""
    batch = next(iter(micro_batches(layout, 1, device)))
    lookups = Lookups(batch.targets.new_zeros(len(batch.targets)), batch.targets.new_zeros(0))
    with autocast(device, student.precision):
        targets, *_ = student(batch, lookups)
    return 0.0 * targets.sum()


def _forward(
    student: StudentPass,
    inputs: StepInputs,
    micro_batch: MicroBatch,
    tail: bool,
) -> tuple[RaggedTopk, RaggedTopk | None, TokenLogprobs]:
    """The student on a micro-batch, and the teacher's alternatives of its tokens."""
    topk = inputs.teacher.topk.select(micro_batch.student_tokens)
    guidance_topk = (
        None if inputs.guidance_topk is None else inputs.guidance_topk.select(micro_batch.guidance_tokens)
    )
    # Lookups go in the order of the positions: per row first guidance, then student tokens.
    counts = _lookup_counts(micro_batch, topk, guidance_topk)
    flat = np.zeros(int(counts.sum()), dtype=np.int64)
    student_entries = np.repeat(micro_batch.is_student, counts)
    flat[student_entries] = topk.ids
    if guidance_topk is not None:
        flat[~student_entries] = guidance_topk.ids
    device = micro_batch.targets.device
    with autocast(device, student.precision):
        lookups = Lookups(torch.from_numpy(counts).to(device), torch.from_numpy(flat).to(device), tail)
        output = TokenLogprobs(*student(micro_batch, lookups))
    return topk, guidance_topk, output


def _token_batch(
    inputs: StepInputs,
    plan: StepPlan,
    micro_batch: MicroBatch,
    topk: RaggedTopk,
    guidance_topk: RaggedTopk | None,
    output: TokenLogprobs,
) -> TokenBatch:
    device, dtype = output.targets.device, output.targets.dtype

    def tensor(values: Any, index: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(values)[index]).to(device=device, dtype=dtype)

    def optional(values: Any) -> Tensor | None:
        return None if values is None else tensor(values, students)

    is_student = torch.from_numpy(micro_batch.is_student).to(device)
    counts = _lookup_counts(micro_batch, topk, guidance_topk)
    student_entries = torch.from_numpy(np.repeat(micro_batch.is_student, counts)).to(device)
    students, prefixes = micro_batch.student_tokens, micro_batch.guidance_tokens
    return TokenBatch(
        student_logprobs=output.targets[is_student],
        teacher_logprobs=tensor(inputs.teacher.teacher_logprobs, students),
        mu_logprobs=tensor(inputs.mu_logprobs, students),
        trust=tensor(plan.trust, students),
        outlier=tensor(plan.outlier, students),
        guidance=tensor(plan.guidance, prefixes),
        guidance_logprobs=output.targets[~is_student],
        trust_advantages=optional(plan.trust_advantages),
        outlier_advantages=optional(plan.outlier_advantages),
        reference_logprobs=optional(inputs.reference_logprobs),
        topk_index=torch.from_numpy(topk.index).to(device),
        topk=_alternatives(topk, output.lookups[student_entries], output.tail[is_student]),
        guidance_topk=(
            None
            if guidance_topk is None
            else _alternatives(guidance_topk, output.lookups[~student_entries], output.tail[~is_student])
        ),
    )


def _lookup_counts(
    micro_batch: MicroBatch, topk: RaggedTopk, guidance_topk: RaggedTopk | None
) -> npt.NDArray[np.int64]:
    """``[n]`` alternatives per supervised position."""
    counts = np.zeros(len(micro_batch.is_student), dtype=np.int64)
    counts[np.flatnonzero(micro_batch.is_student)[topk.index]] = topk.counts
    if guidance_topk is not None:
        counts[np.flatnonzero(~micro_batch.is_student)[guidance_topk.index]] = guidance_topk.counts
    return counts


def _alternatives(topk: RaggedTopk, student_logprobs: Tensor, tails: Tensor) -> Alternatives:
    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(values).to(device=student_logprobs.device)

    return Alternatives(
        teacher_logprobs=tensor(topk.logprobs).to(student_logprobs.dtype),
        student_logprobs=student_logprobs,
        counts=tensor(topk.counts),
        teacher_tail=tensor(topk.tail).to(student_logprobs.dtype),
        student_tail=tails[tensor(topk.index)],
    )


def _measure(
    measured: dict[str, Floats64], micro_batch: MicroBatch, output: TokenLogprobs, batch: TokenBatch
) -> None:
    is_student = torch.from_numpy(micro_batch.is_student).to(output.targets.device)
    tokens = micro_batch.student_tokens
    measured["logprobs"][tokens] = output.targets.detach()[is_student].double().cpu().numpy()
    measured["entropy"][tokens] = output.entropy[is_student].double().cpu().numpy()
    measured["overlap"][tokens] = output.overlap[is_student].double().cpu().numpy()
    if batch.topk is not None and batch.topk_index is not None and len(batch.topk_index):
        mass = batch.topk.sum(batch.topk.student_logprobs.detach().exp())
        measured["mass"][tokens[batch.topk_index.cpu().numpy()]] = mass.double().cpu().numpy()


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
        teacher_entropy=None if inputs.teacher.entropy is None else inputs.teacher.entropy.astype(np.float64),
    )
    if not needs_student_pass(objective):
        return known
    kinds = {weight.kind for weight in objective.token_weights}
    found = {name: np.full(len(advantages), np.nan) for name in ("entropy", "divergence", "overlap")}
    device = next(student.parameters()).device
    with torch.no_grad():
        for number, micro_batch in enumerate(batches):
            _seed(inputs, world, number)
            topk, guidance_topk, output = _forward(student, inputs, micro_batch, "soft_or_top" in kinds)
            tokens, is_student = micro_batch.student_tokens, torch.from_numpy(micro_batch.is_student)
            found["entropy"][tokens] = output.entropy.cpu()[is_student].double().numpy()
            found["overlap"][tokens] = output.overlap.cpu()[is_student].double().numpy()
            found["divergence"][tokens] = 0.0
            if "soft_or_top" not in kinds:
                continue
            counts = _lookup_counts(micro_batch, topk, guidance_topk)
            entries = torch.from_numpy(np.repeat(micro_batch.is_student, counts)).to(device)
            alternatives = _alternatives(topk, output.lookups[entries], output.tail[is_student.to(device)])
            found["divergence"][tokens[topk.index]] = topk_reverse_kl(alternatives).double().cpu().numpy()
        for _ in range(len(batches), rounds):
            _idle(student, layout, device)
    merged = {name: world.merge(values) for name, values in found.items()}
    return replace(
        known,
        student_entropy=merged["entropy"],
        divergence=merged["divergence"],
        overlap=merged["overlap"],
    )


def _add_region_gradients(
    regions: Any, parameters: Sequence[torch.nn.Parameter], sums: dict[str, list[Tensor]]
) -> None:
    for name, value in regions.items():
        found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        old = sums.get(name)
        sums[name] = list(found) if old is None else [a + b for a, b in zip(old, found, strict=True)]
