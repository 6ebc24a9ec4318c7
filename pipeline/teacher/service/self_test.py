"""The self-test that a teacher must pass before it is called ready."""

from __future__ import annotations

import numpy as np

from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.objectives.partition_specs import AllTrusted
from tropd.pipeline.teacher.service.batcher import TeacherOutputError, score_requests
from tropd.pipeline.teacher.wire.messages import ScoreItem, ScoreRequest

SELF_TEST_TOKENS = 48
"""Several blocks of a prefix cache."""
SELF_TEST_DIFFERENCE = 0.05
"""Two runs of the same tokens differ by rounding at most, in bfloat16 too."""


def self_test(engine: Engine) -> None:
    """Score a few tokens twice; a teacher that cannot, or answers differently the second time, must not be ready.

    The second time finds the first one in whatever cache the engine has.

    Raises:
        TeacherOutputError: it gives log-probs that are NaN, infinite or positive, or other ones the second time.
    """
    ids = np.arange(min(SELF_TEST_TOKENS, engine.max_length), dtype=np.int32) % 2
    tokens = np.minimum(ids, engine.vocab_size - 1).astype(np.int32)
    item = ScoreItem(tokens, 1, np.full(len(tokens) - 1, -1.0, dtype=np.float32), 0)
    request = ScoreRequest([item], AllTrusted(), "all", 1, False, engine.vocab_size)
    first, second = (score_requests(engine, [request])[0].items[0].teacher_logprobs for _ in range(2))
    if not np.isfinite(first).all():
        raise TeacherOutputError("the teacher gave log-probs that are not finite")
    difference = float(np.abs(second - first).max(initial=0.0))
    if not difference <= SELF_TEST_DIFFERENCE:
        raise TeacherOutputError(
            f"the teacher gave the same tokens different log-probs the second time (difference {difference:.2g})"
        )
