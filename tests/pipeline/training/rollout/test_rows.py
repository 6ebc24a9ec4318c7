"""Rows of a step: what the student goes on from, and what its tokens were drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tropd.pipeline.config.sections.training_settings import RolloutConfig
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.objectives.objective import Schedule
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.training.rollout.rows import (
    RowPlan,
    mu_logprobs,
    plan_rows,
    prompts_of_step,
    roll_out,
    sampler_logprobs,
)
from tropd.storage.formats.trajectories import Trajectory, write_trajectories
from tropd.storage.formats.trajectory_store import TrajectoryStore
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage

LIMIT = 10
WRITTEN = {"whole": (4, "stop"), "cut": (4, "length"), "full": (LIMIT, "length"), "longer": (14, "stop")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    folder = tmp_path_factory.mktemp("stage") / "prefixes"
    with open_stage(folder, "prefixes", Fingerprint({"made": "here"})) as stage:
        rows = [
            Trajectory(
                prompt_id=name,
                sample_index=0,
                prompt_tokens=[5, 6],
                tokens=list(range(2, 2 + length)),
                sampled_logprobs=[-1.0] * length,
                finish_reason=reason,  # type: ignore[arg-type]
                text="",
                author="teacher",
            )
            for name, (length, reason) in WRITTEN.items()
        ]
        stage.commit("part.parquet", write_trajectories(folder / "part.parquet", rows))
        stage.finish()
        return TrajectoryStore(folder, stage.manifest)


def plans(store: TrajectoryStore, limit: int, continued: bool = True, **schedule: Any) -> dict[str, RowPlan]:
    names = list(WRITTEN)
    rollout = RolloutConfig(prompts_per_step=len(names), samples_per_prompt=1, max_tokens=LIMIT)
    rows = plan_rows(
        0,
        prompts=[EncodedPrompt(Prompt(name, "", None), [5, 6]) for name in names],
        store=store,
        schedule=Schedule(kind="constant", **schedule),
        limit=limit,
        rollout=rollout,
        seed=0,
        continued=continued,
    )
    return {names[row.prompt_index]: row for row in rows}


def test_the_order_of_prompts_and_the_seeds_of_rows_never_change(store: TrajectoryStore) -> None:
    steps = [prompts_of_step(step, num_prompts=10, per_step=4, seed=0) for step in range(3)]
    assert steps == [[4, 0, 1, 5], [3, 7, 8, 2], [9, 6, 0, 6]]
    assert plans(store, limit=2)["whole"].seed == 4601863689009326234


def test_a_trajectory_that_ended_by_its_length_is_continued(store: TrajectoryStore) -> None:
    found = plans(store, limit=LIMIT)
    assert {name: len(row.prefix_tokens) for name, row in found.items()} == {
        "whole": 4,
        "cut": 4,
        "full": LIMIT,
        "longer": LIMIT,
    }
    assert {name for name, row in found.items() if not row.prefix_complete} == {"cut"}
    # There the response is over, but not whole.
    assert {name for name, row in found.items() if row.prefix_truncated} == {"full", "longer"}
    assert not any(row.prefix_complete or row.prefix_truncated for row in plans(store, limit=3).values())


def test_in_units_of_the_trajectory_each_row_gives_the_same_share_of_its_own(store: TrajectoryStore) -> None:
    for limit in range(LIMIT):
        found = plans(store, limit, unit="trajectory")
        # "full" and "longer" are as long as a response may be: for them both units are one.
        exact = {name: min(length, LIMIT) * limit // LIMIT for name, (length, _) in WRITTEN.items()}
        assert {name: len(row.prefix_tokens) for name, row in found.items()} == exact
        assert not any(row.prefix_complete for row in found.values())
    whole = plans(store, LIMIT, unit="trajectory")
    assert whole == plans(store, LIMIT)  # a share of 1 is everything, and what was cut off is continued
    assert not whole["cut"].prefix_complete


def test_in_units_of_the_trajectory_uniform_lengths_stay_within_the_share(store: TrajectoryStore) -> None:
    found = [plans(store, 5, unit="trajectory", length="uniform") for _ in range(2)]
    assert found[0] == found[1]
    assert all(
        len(found[0][name].prefix_tokens) <= min(length, LIMIT) // 2 for name, (length, _) in WRITTEN.items()
    )


def test_a_student_that_writes_nothing_continues_nothing(store: TrajectoryStore) -> None:
    found = plans(store, limit=LIMIT, continued=False)
    assert all(row.prefix_complete for row in found.values())
    assert {name for name, row in found.items() if row.prefix_truncated} == {"cut", "full", "longer"}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_rows_know_what_their_tokens_were_drawn_from(
    tiny_model: Any, store: TrajectoryStore, temperature: float, top_p: float
) -> None:
    rollout = RolloutConfig(max_tokens=LIMIT, temperature=temperature, top_p=top_p)
    rows = roll_out(list(plans(store, LIMIT).values()), TransformersEngine(tiny_model, [1]), rollout)
    assert [row.truncated for row in rows if not row.tokens] == [
        row.plan.prefix_truncated for row in rows if not row.tokens
    ]
    (row,) = [row for row in rows if row.tokens]
    with torch.no_grad():
        logits = tiny_model(input_ids=torch.tensor([row.sequence])).logits[0, len(row.context) - 1 : -1]
    tokens = torch.tensor(row.tokens).unsqueeze(-1)
    own = torch.log_softmax(logits, -1).gather(-1, tokens).squeeze(-1)
    np.testing.assert_allclose(row.sampler_logprobs, own, atol=1e-4)
    ordered, order = torch.softmax(logits.double() / temperature, -1).sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    mu = torch.zeros_like(ordered).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
    np.testing.assert_allclose(mu_logprobs([row]), mu.gather(-1, tokens).squeeze(-1).log(), atol=1e-4)
    assert (row.drawn_logprobs is None) == (temperature == top_p == 1.0)
    assert sampler_logprobs(rows).tolist() == [p for row in rows for p in row.sampler_logprobs]
    assert mu_logprobs(rows).dtype == sampler_logprobs([]).dtype == np.float64
