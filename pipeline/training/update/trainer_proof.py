"""The training pass on a few rows of the run, before the first step: its log-probs are those of a plain forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tropd.pipeline.models.engines import proof
from tropd.pipeline.models.output.logprobs import Lookups
from tropd.pipeline.models.runtime import autocast, evaluation_mode
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.update.micro_batches import Layout, micro_batches
from tropd.pipeline.training.update.student import StudentPass, reshard
from tropd.storage.arrays import Floats32


def prove_pass(passes: StudentPass, whole_model: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Try rows of the run, packed or padded as they will be. Every process takes part, with the same rows.

    Args:
        whole_model: the same weights as the model of ``passes``, which may be sharded.

    Raises:
        ConfigError: the model cannot be trained right.
    """
    model, precision = passes.model, passes.precision
    name, rows = type(model).__name__, proof.few(sequences)
    rows.append(rows[1])  # the halves fit into one line

    def scored(rows: proof.TokenRows, starts: Sequence[int]) -> list[Floats32]:
        with (
            torch.no_grad(),
            evaluation_mode(model),
            autocast(model.device, precision),
            torch.compiler.set_stance("force_eager"),
        ):
            written = [_row(list(row), start) for row, start in zip(rows, starts, strict=True)]
            # In one batch, whatever its size: they are few.
            return row_logprobs(passes, written, sum(len(row) for row in rows) * len(rows))

    try:
        with proof.refusing(name):
            plain = proof.plain_logprobs(whole_model, precision, passes.split.limit)
            proof.require_equal_scores(name, rows, scored, plain, proof.tolerance(precision or model.dtype))
    finally:
        reshard(passes)


def row_logprobs(passes: StudentPass, rows: Sequence[Row], budget: int) -> list[Floats32]:
    """Log-probs of each row's student tokens, by the pass that trains, in micro-batches of ``budget`` tokens."""
    layout = Layout(rows, guided=False)
    found = np.zeros(int(layout.student_counts.sum()), dtype=np.float32)
    for batch in micro_batches(layout, budget, passes.model.device, packing=passes.packing):
        found[batch.student_tokens] = (
            passes(batch, Lookups.none(batch.targets))[0].detach().float().cpu().numpy()
        )
    return np.split(found, np.cumsum(layout.student_counts)[:-1])


_PLAN = RowPlan(0, 0, (), (), None, False, 0)


def _row(tokens: list[int], start: int) -> Row:
    written = tokens[start:]
    return Row(replace(_PLAN, prompt_tokens=tokens[:start]), written, [0.0] * len(written), False)
