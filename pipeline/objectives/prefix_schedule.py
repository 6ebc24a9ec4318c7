"""The curriculum: how many tokens of a teacher trajectory the student continues from, at each step."""

from __future__ import annotations

import math

from tropd.pipeline.objectives.objective import Schedule
from tropd.storage.seeds import derive_seed, uniforms


def scheduled_length(schedule: Schedule, *, step: int, total_steps: int, max_tokens: int) -> int:
    """Longest prefix at ``step`` (from 0), in tokens.

    cosine: l = round(L·f0·½(1 + cos(π·step/steps_guided))), 0 from steps_guided on, with L = ``max_tokens``
    and steps_guided = steps_share·total_steps (arXiv 2606.01249, wording; formula reconstructed).
    """
    if schedule.kind == "none":
        return 0
    if schedule.kind == "constant":
        return round(max_tokens * schedule.fraction)
    guided = schedule.steps_share * total_steps
    if step >= guided:
        return 0
    return round(max_tokens * schedule.fraction * 0.5 * (1.0 + math.cos(math.pi * step / guided)))


def row_limit(schedule: Schedule, *, limit: int, max_tokens: int, written: int) -> int:
    """Longest prefix of a row whose trajectory has ``written`` tokens, in a step whose scheduled length is ``limit``.

    In the unit ``trajectory`` the share of the step, limit/max_tokens, is one of these tokens, rounded down: below 1
    it always leaves the student something to write.
    """
    return limit if schedule.unit == "tokens" else written * limit // max_tokens


def prefix_length(schedule: Schedule, *, limit: int, seed: int) -> int:
    """Prefix length of one row: ``limit`` itself, or uniform on 0 … limit from the row's seed."""
    if schedule.length == "max":
        return limit
    return int(uniforms(derive_seed(seed, "prefix-length"), 0) * (limit + 1))
