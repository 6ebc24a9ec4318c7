"""How far above 0 a log-prob may be, for all who take one from a model, a file or another machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOGPROB_SLACK = 1e-3
"""A log-softmax in float32 may end a little above 0. More is an error; so little counts as 0."""


def are_logprobs(values: npt.ArrayLike) -> bool:
    """Whether values may be log-probs: none is NaN, and none above 0 but for rounding. Minus infinity is one."""
    return bool((np.asarray(values) <= LOGPROB_SLACK).all())
