"""The student's likeliest ids: chosen as rows are rolled out, kept with them in a checkpoint, and asked about."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from teacher_here import TeacherHere

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.sections.training_settings import RolloutConfig
from tropd.pipeline.models.engines.base import choose_with
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.training.record.checkpoint import ROWS, load_rows, row_tensors
from tropd.pipeline.training.rollout.choosing import all_chosen_ids, choosing
from tropd.pipeline.training.rollout.rows import Row, RowPlan, roll_out
from tropd.pipeline.training.signal.ask_teacher import ask_teacher

V, K = 24, 4
PLANS = [
    RowPlan(0, 0, [5, 6], [7], 0, False, seed=1),
    RowPlan(0, 0, [5, 6], [7, 1], 0, True, seed=2),  # the prefix is a whole response
    RowPlan(1, 1, [8], [], None, False, seed=3),
]


@pytest.fixture(scope="module")
def rows(tiny_model: Any) -> list[Row]:
    engine = TransformersEngine(tiny_model, [1])
    rollout = RolloutConfig(max_tokens=9)
    return roll_out(PLANS, engine, rollout, choose=choosing(choose_with(engine), K, 20))


def test_rows_know_the_likeliest_ids_at_each_of_their_tokens(tiny_model: Any, rows: list[Row]) -> None:
    assert rows[1].chosen_ids is None
    for row in (rows[0], rows[2]):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([row.sequence])).logits[0, len(row.context) - 1 : -1, :20]
        assert row.chosen_ids is not None
        assert np.array_equal(row.chosen_ids, logits.topk(K, dim=-1).indices.numpy())
    assert len(all_chosen_ids(rows)) == sum(len(row.tokens) for row in rows)
    assert all_chosen_ids([rows[1]]).shape == (0, 0)


def test_what_is_sampled_does_not_depend_on_it(tiny_model: Any, rows: list[Row]) -> None:
    plain = roll_out(PLANS, TransformersEngine(tiny_model, [1]), RolloutConfig(max_tokens=9))
    for row, one in zip(plain, rows, strict=True):
        assert (list(row.tokens), list(row.sampler_logprobs)) == (
            list(one.tokens),
            list(one.sampler_logprobs),
        )
        assert row.chosen_ids is None


def test_a_checkpoint_keeps_the_ids_of_rows_that_wait(rows: list[Row], tmp_path: Path) -> None:
    save_file(row_tensors(rows), tmp_path / ROWS)
    kept = load_rows(tmp_path, PLANS)
    assert kept is not None
    assert np.array_equal(all_chosen_ids(kept), all_chosen_ids(rows))
    for row, one in zip(kept, rows, strict=True):
        if one.chosen_ids is not None:
            assert np.array_equal(row.chosen_ids, one.chosen_ids)
    save_file(row_tensors([Row(plan, [2, 3], [-1.0, -1.0], False) for plan in PLANS]), tmp_path / ROWS)
    kept = load_rows(tmp_path, PLANS)
    assert kept is not None
    assert all(row.chosen_ids is None for row in kept)


@pytest.mark.parametrize(("name", "overlap"), [("rkl-topk", False), ("prune-opd", True)])
def test_the_teacher_is_asked_about_these_ids_and_nothing_else(
    tiny_model: Any, rows: list[Row], name: str, overlap: bool
) -> None:
    teacher = copy.deepcopy(tiny_model)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    objective, scorer = load_objective(name, {"k": K}), TeacherHere(TransformersEngine(teacher, [1]))
    data = ask_teacher({"": scorer}, rows, objective, teacher_needs(objective), V)
    (request,) = scorer.requests
    assert (request.topk, request.k, request.chosen, request.overlap) == ("none", 0, K, overlap)
    assert len(request.sequences) == 2
    assert np.array_equal(data.topk.ids.reshape(-1, K), all_chosen_ids(rows))
    assert (data.overlap is not None) == overlap
    exact = []
    for row in rows:
        if row.tokens:
            with torch.no_grad():
                logits = teacher(torch.tensor([row.sequence])).logits[0, len(row.context) - 1 : -1]
            ids = torch.tensor(np.asarray(row.chosen_ids), dtype=torch.long)
            exact.append(torch.log_softmax(logits, -1).gather(-1, ids))
    assert np.allclose(data.topk.logprobs.reshape(-1, K), torch.cat(exact).numpy(), atol=1e-5)
    rest = np.log1p(-np.exp(torch.cat(exact).double().numpy()).sum(-1))
    assert np.allclose(data.topk.tail, rest, atol=1e-4)
