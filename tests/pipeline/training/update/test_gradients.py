"""A whole step against a naive reference that loops over rows and tokens; and what a step must not depend on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_inputs import LocalScorer, V, likeliest, make_inputs, make_rows

from tropd.pipeline.config.recipe_files import load_objective, recipe_names
from tropd.pipeline.config.sections.training_settings import TrainConfig
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.objective import Objective
from tropd.pipeline.teacher.wire.messages import ScoreRequest, ScoreResponse, encode_response
from tropd.pipeline.training.record.step_metrics import step_metrics
from tropd.pipeline.training.rollout import rows
from tropd.pipeline.training.rollout.rows import Row
from tropd.pipeline.training.signal.ask_teacher import TeacherData, ask_teacher, draw_regions
from tropd.pipeline.training.update import gradients
from tropd.pipeline.training.update.gradients import NonFiniteError, StepInputs, StepOutcome, backpropagate
from tropd.pipeline.training.update.micro_batches import MicroBatch, Packing, RaggedTopk, fill_lines
from tropd.pipeline.training.update.student import StudentPass
from tropd.pipeline.training.world import World


@pytest.fixture(scope="module")
def teacher_model(tiny_model: Any) -> Any:
    other = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture
def student(tiny_model: Any) -> Any:
    return copy.deepcopy(tiny_model)


def run(
    model: Any, objective: Objective, inputs: StepInputs, budget: int = 10_000, region_gradients: bool = False
) -> tuple[StepOutcome, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    parameters = list(model.parameters())
    outcome = backpropagate(
        StudentPass(model),
        parameters,
        objective,
        inputs,
        micro_batch_tokens=budget,
        region_gradients=region_gradients,
    )
    flat = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    return outcome, torch.cat(flat)


def naive_tropd(model: Any, teacher_model: Any, rows: list[Row], inputs: StepInputs) -> torch.Tensor:
    """L of TrOPD, token by token: K1 where trusted, top-k forward KL on outliers, β·NLL on the prefix."""
    total, count, t = torch.zeros(()), 0, 0
    for row in rows:
        sequence = torch.tensor([row.sequence])
        logprobs = torch.log_softmax(model(sequence).logits[0], -1)
        with torch.no_grad():
            teacher = torch.log_softmax(teacher_model(sequence).logits[0], -1)
        first = len(row.plan.prompt_tokens)
        for position in range(first, len(row.sequence)):
            token = row.sequence[position]
            ours, theirs = logprobs[position - 1], teacher[position - 1]
            count += 1
            if position < len(row.context):
                total = total + 0.001 * -ours[token]
                continue
            if inputs.regions.trust[t]:
                total = total - (theirs[token] - ours[token]).detach() * ours[token]
            else:
                best = theirs.topk(5).indices
                total = total + (theirs[best].exp() * (theirs[best] - ours[best])).sum()
            t += 1
    return total / count


def test_tropd_equals_the_naive_reference(student: Any, teacher_model: Any) -> None:
    objective = load_objective("tropd", {"k": 5})
    rows = make_rows(student)
    inputs = make_inputs(objective, rows, teacher_model)
    assert 0 < inputs.regions.outlier.sum() < len(inputs.regions.outlier)
    outcome, gradient = run(student, objective, inputs)
    student.zero_grad(set_to_none=True)
    loss = naive_tropd(student, teacher_model, rows, inputs)
    loss.backward()
    exact = torch.cat([p.grad.reshape(-1) for p in student.parameters()])
    assert sum(outcome.losses.values()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert torch.allclose(gradient, exact, atol=1e-6)


def naive_reverse_kl(model: Any, teacher_model: Any, rows: list[Row], k: int | None) -> torch.Tensor:
    """The mean over student tokens of KL(π_S‖π_T), over all ids, or over those chosen and the rest."""
    total, count = torch.zeros(()), 0
    for row in rows:
        sequence = torch.tensor([row.sequence])
        logprobs = torch.log_softmax(model(sequence).logits[0], -1)
        with torch.no_grad():
            teacher = torch.log_softmax(teacher_model(sequence).logits[0], -1)
        for i in range(len(row.tokens)):
            ours, theirs = (p[len(row.context) + i - 1] for p in (logprobs, teacher))
            if k is not None:
                ids = likeliest(row, k)[i]
                rest = [v for v in range(V) if v not in ids]
                ours = torch.cat([ours[ids], ours[rest].logsumexp(0)[None]])
                theirs = torch.cat([theirs[ids], theirs[rest].logsumexp(0)[None]])
            total = total + (ours.exp() * (ours - theirs)).sum()
            count += 1
    return total / count


@pytest.mark.parametrize("k", [None, 1, 6])
def test_rkl_topk_equals_the_naive_reference_and_at_k_the_whole_vocabulary_the_exact_reverse_kl(
    student: Any, teacher_model: Any, k: int | None
) -> None:
    objective = load_objective("rkl-topk", {"k": k or V})
    rows = make_rows(student, prefixes=False)
    inputs = make_inputs(objective, rows, teacher_model)
    outcome, gradient = run(student, objective, inputs)
    student.zero_grad(set_to_none=True)
    loss = naive_reverse_kl(student, teacher_model, rows, k)
    loss.backward()
    exact = torch.cat([p.grad.reshape(-1) for p in student.parameters()])
    assert sum(outcome.losses.values()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert torch.allclose(gradient, exact, atol=1e-6)
    assert np.isnan(outcome.overlap).all()  # the teacher was not asked


def test_the_overlap_of_chosen_ids_is_that_of_the_teacher(student: Any, teacher_model: Any) -> None:
    objective = load_objective("prune-opd", {"k": 6})
    rows = make_rows(student, prefixes=False)
    inputs = make_inputs(objective, rows, teacher_model)
    outcome, _ = run(student, objective, inputs)
    found = iter(outcome.overlap)
    for row in rows:
        with torch.no_grad():
            logits = teacher_model(torch.tensor([row.sequence])).logits[0]
        for i, ids in enumerate(likeliest(row, 6)):
            best = set(logits[len(row.context) + i - 1].topk(6).indices.tolist())
            assert next(found) == pytest.approx(len(best & set(ids)) / 6)


def test_the_sample_correction_sees_which_drawn_tokens_are_outside(student: Any, teacher_model: Any) -> None:
    """With the drawn token among the ids it is the plain tail-aware loss; with none of them, another."""
    rows = make_rows(student, prefixes=False)
    objective = load_objective("tail-aware", {"k": 4})
    plain = load_objective("tail-aware", {"k": 4, "outlier": {"loss": {"sample_corrected": False}}})
    inputs = make_inputs(objective, rows, teacher_model)
    assert run(student, objective, inputs)[0].losses == run(student, plain, inputs)[0].losses
    others = [
        replace(row, chosen_ids=(row.chosen_ids + 1) % V) if row.chosen_ids is not None else row
        for row in inputs.rows
    ]
    teacher = ask_teacher({"": LocalScorer(teacher_model)}, others, objective, teacher_needs(objective), V)
    inputs = replace(inputs, rows=others, teacher=teacher)
    corrected, without = run(student, objective, inputs)[0], run(student, plain, inputs)[0]
    ratio = teacher.teacher_logprobs - inputs.sampler_logprobs
    student_tail = np.concatenate(
        [tails_of(student, row, np.asarray(row.chosen_ids)) for row in others if row.tokens]
    )
    by_hand = np.mean(student_tail * -1 - ratio + teacher.topk.tail)
    difference = sum(corrected.losses.values()) - sum(without.losses.values())
    assert difference == pytest.approx(by_hand, abs=1e-5)


def tails_of(model: Any, row: Row, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([row.sequence])).logits[0].double(), -1)
    places = range(len(row.context) - 1, len(row.sequence) - 1)
    outside = [[v for v in range(V) if v not in here] for here in ids]
    return np.array([float(logprobs[p][rest].logsumexp(0)) for p, rest in zip(places, outside, strict=True)])


K1_ON_OUTLIERS = {
    "partition": {"rule": "ratio", "threshold": 0.9},
    "outlier": {
        "loss": {
            "estimator": "k1",
            "reward_scale": 1.5,
            "proximal": 0.5,
            "returns": True,
            "standardize": True,
        }
    },
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((n, {}) for n in recipe_names("objectives") if n != "sft"),
        pytest.param("top-d", K1_ON_OUTLIERS, id="planned-advantages-of-both-regions"),
        pytest.param("opd", K1_ON_OUTLIERS, id="planned-advantages-of-outliers"),
    ],
)
def test_no_objective_depends_on_micro_batches_or_row_order(
    student: Any, teacher_model: Any, name: str, changes: dict[str, Any]
) -> None:
    objective = load_objective(name, {"k": 6, **changes})
    guided = objective.schedule.kind != "none"
    rows = make_rows(student, prefixes=guided)
    inputs = make_inputs(objective, rows, teacher_model)
    outcome, gradient = run(student, objective, inputs)
    assert torch.isfinite(gradient).all()
    assert float(gradient.norm()) > 0
    small, small_gradient = run(student, objective, inputs, budget=12)
    assert sum(small.losses.values()) == pytest.approx(sum(outcome.losses.values()), rel=1e-6, abs=1e-6)
    assert torch.allclose(small_gradient, gradient, atol=1e-6)
    assert np.allclose(small.student_logprobs, outcome.student_logprobs, atol=1e-6)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    _, other = run(student, objective, make_inputs(objective, shuffled, teacher_model))
    assert torch.allclose(other, gradient, atol=1e-6)


@pytest.mark.parametrize("partition", ["all", "none"])
def test_a_step_with_one_empty_region_is_no_special_case(
    student: Any, teacher_model: Any, partition: str
) -> None:
    objective = load_objective("tropd", {"partition": {"rule": partition}, "k": 4})
    outcome, gradient = run(student, objective, make_inputs(objective, make_rows(student), teacher_model))
    assert outcome.losses["outlier" if partition == "all" else "trust"] == 0.0
    assert torch.isfinite(gradient).all()


def test_rows_of_prefix_only_and_a_step_without_any_token(student: Any, teacher_model: Any) -> None:
    objective = load_objective("tropd")
    rows = [r for r in make_rows(student) if not r.tokens]
    outcome, gradient = run(student, objective, make_inputs(objective, rows, teacher_model))
    assert outcome.losses["guidance"] > 0
    assert float(gradient.norm()) > 0
    nothing = load_objective("opd")
    outcome, gradient = run(student, nothing, make_inputs(nothing, rows, teacher_model))
    assert sum(outcome.losses.values()) == 0.0
    assert float(gradient.norm()) == 0.0


@pytest.mark.parametrize("name", ["opd", "tropd-noguidance", "aopd", "eopd", "gkd", "vopd", "tip", "iw-opd"])
def test_teacher_equal_to_student_teaches_nothing(student: Any, name: str) -> None:
    objective = load_objective(name, {"k": V})
    inputs = make_inputs(objective, make_rows(student, prefixes=False), student)
    _, gradient = run(student, objective, inputs)
    assert float(gradient.norm()) < 1e-4


def test_region_gradients_add_up(student: Any, teacher_model: Any) -> None:
    objective = load_objective("tropd")
    inputs = make_inputs(objective, make_rows(student), teacher_model)
    plain, gradient = run(student, objective, inputs)
    measured, same = run(student, objective, inputs, budget=20, region_gradients=True)
    assert torch.allclose(gradient, same, atol=1e-6)
    assert plain.region_gradient_norms == {}
    norms = measured.region_gradient_norms
    assert set(norms) == {"trust", "outlier", "guidance"}
    assert float(gradient.norm()) <= sum(norms.values()) + 1e-6


@pytest.mark.parametrize("name", ["opd", "tropd", "tropd-mask", "entropy-opd", "tropd-cached"])
def test_tokens_without_a_loss_are_not_counted_as_supervised(
    student: Any, teacher_model: Any, name: str
) -> None:
    objective = load_objective(name, {"k": 5})
    inputs = make_inputs(objective, make_rows(student, count=40), teacher_model)
    outcome, _ = run(student, objective, inputs)
    total = len(inputs.teacher.teacher_logprobs)
    prefix = sum(len(row.plan.prefix_tokens) for row in inputs.rows)
    outliers = int(inputs.regions.outlier.sum())
    assert outliers > 0 or name in ("opd", "entropy-opd")
    expected = {
        "opd": total,
        "tropd": total + prefix,
        "tropd-mask": total - outliers,
        "entropy-opd": math.ceil(0.2 * total),
        "tropd-cached": total + prefix,
    }
    assert outcome.supervised_tokens == expected[name]
    assert step_metrics(inputs, outcome)["tokens_supervised"] == expected[name]


def test_log_probs_of_a_step_are_flattened_once(
    student: Any, teacher_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flattened = []
    for name in ("sampler_logprobs", "mu_logprobs"):
        flatten = getattr(rows, name)
        monkeypatch.setattr(
            gradients, name, lambda rows, name=name, flatten=flatten: flattened.append(name) or flatten(rows)
        )
    inputs = make_inputs(load_objective("opd"), make_rows(student, count=40), teacher_model)
    outcome, _ = run(student, load_objective("opd"), inputs, budget=1)
    step_metrics(inputs, outcome)
    assert sorted(flattened) == ["mu_logprobs", "sampler_logprobs"]


@pytest.mark.parametrize("guidance", [{"loss": {"estimator": "zero"}}, {"weight": 0.0}])
def test_prefix_tokens_without_a_loss_are_not_counted_as_supervised(
    student: Any, teacher_model: Any, guidance: dict[str, Any]
) -> None:
    objective = load_objective("tropd", {"k": 5, "guidance": guidance})
    assert objective.schedule.kind == "cosine"
    assert not objective.guides
    inputs = make_inputs(objective, make_rows(student), teacher_model)
    assert sum(len(row.plan.prefix_tokens) for row in inputs.rows) > 0
    outcome, _ = run(student, objective, inputs)
    assert outcome.losses["guidance"] == 0.0
    assert step_metrics(inputs, outcome)["tokens_supervised"] == len(inputs.teacher.teacher_logprobs)


def test_a_process_without_rows_idles_over_the_shortest(
    student: Any, teacher_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes along with another's longest micro-batch, in which the weights are gathered."""

    class OthersHaveTwoMore(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, value + 2] if isinstance(value, int) else [value]

    objective, sizes = load_objective("opd"), []
    inputs = make_inputs(objective, make_rows(student, prefixes=False), teacher_model)
    forward = StudentPass.forward

    def counted(self: StudentPass, batch: MicroBatch, lookups: Any) -> Any:
        sizes.append(batch.inputs["input_ids"].numel())
        return forward(self, batch, lookups)

    monkeypatch.setattr(StudentPass, "forward", counted)
    _, expected = run(student, objective, inputs)
    assert len(sizes) == 1
    student.zero_grad(set_to_none=True)
    parameters = list(student.parameters())
    world = OthersHaveTwoMore()
    backpropagate(StudentPass(student), parameters, objective, inputs, micro_batch_tokens=10_000, world=world)
    assert sizes[2:] == [min(len(row.sequence) for row in inputs.rows)] * 2
    found = torch.cat([p.grad.reshape(-1) for p in parameters])
    assert torch.equal(found, expected)


def test_a_non_finite_loss_is_an_error(student: Any, teacher_model: Any) -> None:
    objective = load_objective("opd")
    inputs = make_inputs(objective, make_rows(student), teacher_model)
    with torch.no_grad():
        next(iter(student.parameters())).fill_(math.nan)
    with pytest.raises(NonFiniteError):
        run(student, objective, inputs)


def test_a_teacher_that_excludes_every_token_gives_finite_losses(student: Any, teacher_model: Any) -> None:
    rows = make_rows(student, prefixes=False)
    for name in ("opd", "tropd-noguidance", "tropd-clip", "iw-opd"):
        objective = load_objective(name, {"k": 3})
        asked = ask_teacher({"": LocalScorer(teacher_model)}, rows, objective, teacher_needs(objective), V)
        impossible = np.full_like(asked.teacher_logprobs, -np.inf)
        topk = RaggedTopk(
            np.arange(len(impossible)),
            np.full(len(impossible), 3, dtype=np.int64),
            np.tile(np.array([2, 3, 4], dtype=np.int64), len(impossible)),
            np.tile(np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32)), len(impossible)),
            np.full(len(impossible), -np.inf, dtype=np.float32),
        )
        teacher = TeacherData(impossible, None, topk)
        regions = draw_regions(objective, rows, teacher)
        if objective.partition.rule == "sampled":
            assert regions.trust.sum() == 0
        outcome, gradient = run(student, objective, StepInputs(rows, teacher, regions, None, None, 0.0))
        assert math.isfinite(sum(outcome.losses.values()))
        assert torch.isfinite(gradient).all()


def test_only_student_tokens_are_asked_for(student: Any, teacher_model: Any) -> None:
    rows = make_rows(student)
    asked: list[ScoreRequest] = []

    class Recorder(LocalScorer):
        def score(self, request: ScoreRequest) -> ScoreResponse:
            asked.append(request)
            return super().score(request)

    objective = load_objective("tropd", {"k": 5})
    data = ask_teacher({"": Recorder(teacher_model)}, rows, objective, teacher_needs(objective), V)
    assert sum(len(i.tokens) - i.start for r in asked for i in r.sequences) == sum(
        len(r.tokens) for r in rows
    )
    assert len(data.teacher_logprobs) == sum(len(r.tokens) for r in rows)
    regions = draw_regions(objective, rows, data)
    assert np.array_equal(data.topk.index, np.flatnonzero(regions.outlier))


def test_alternatives_on_outliers_only_give_the_loss_of_asking_for_all(
    student: Any, teacher_model: Any
) -> None:
    objective = load_objective("tropd", {"k": 64})
    rows = make_rows(student, count=40)
    scorer, sizes, losses = LocalScorer(teacher_model), [], []
    for scope in ("outliers", "all"):
        needs = replace(teacher_needs(objective), topk=scope)
        asked: list[bytes] = []

        class Wire(LocalScorer):
            def score(self, request: ScoreRequest) -> ScoreResponse:
                answer = scorer.score(request)
                k = answer.items[0].topk_ids.shape[1]
                asked.append(encode_response(answer, k=k, entropy=False))  # noqa: B023
                return answer

        teacher = ask_teacher({"": Wire(teacher_model)}, rows, objective, needs, V)
        inputs = StepInputs(rows, teacher, draw_regions(objective, rows, teacher), None, None, 0.0)
        outcome, gradient = run(student, objective, inputs)
        sizes.append(len(asked[0]))
        losses.append((sum(outcome.losses.values()), gradient))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-5)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("budget", [40, 10_000])
def test_packed_rows_teach_what_padded_ones_do(student: Any, teacher_model: Any, budget: int) -> None:
    objective = load_objective("tropd-cached", {"k": 6})
    inputs = make_inputs(objective, make_rows(student, count=12), teacher_model)
    assert StudentPass(student).packing == "lines"
    outcome, gradient = run(student, objective, inputs, budget=budget)
    original = StudentPass.__init__

    def without(self: StudentPass, model: Any) -> None:
        original(self, model)
        self.packing = "padded"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentPass, "__init__", without)
        padded, expected = run(student, objective, inputs, budget=budget)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert np.allclose(outcome.student_logprobs, padded.student_logprobs, atol=1e-5)


def test_a_model_that_does_not_tell_rows_apart_is_given_padded_ones(student: Any) -> None:
    forward = student.forward
    student.forward = lambda position_ids=None, **inputs: forward(**inputs)
    assert StudentPass(student).packing == "padded"


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 200),
    st.sampled_from(["padded", "lines", "one line"]),
)
def test_lines_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int, packing: Packing
) -> None:
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    seen: list[int] = []
    while left:
        longest = lengths[left[0]]
        lines, left = fill_lines(left, lengths, budget, packing)
        widths = [sum(lengths[i] for i in line) for line in lines]
        assert len(lines) * max(widths) <= max(budget, longest)
        assert packing == "one line" or max(widths) == longest
        assert packing != "one line" or len(lines) == 1
        assert packing != "padded" or all(len(line) == 1 for line in lines)
        seen += [i for line in lines for i in line]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_micro_batch_holds_two_rows_of_any_length_by_default() -> None:
    """One line of a budget of 1.9 lines would leave almost half of it empty."""
    for longest, lines in ((8296, 2), (3000, 2), (500, 8)):
        budget = TrainConfig().micro_batch(longest)
        found, left = fill_lines(range(20), [longest] * 20, budget, "lines")
        assert [len(found), len(found) + len(left)] == [lines, 20]
    assert TrainConfig(micro_batch_tokens=60).micro_batch(8296) == 60
