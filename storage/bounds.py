"""Bound of log-probs above 0, for every reader of a model, a file or another machine's answer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LOGPROB_SLACK = 1e-3
"""A log-softmax in float32 may end a little above 0. More is an error; so little counts as 0."""


def are_logprobs(values: npt.ArrayLike) -> bool:
    """True if values may be log-probs: none is NaN, and none above 0 but for rounding. Minus infinity is one."""
    return bool((np.asarray(values) <= LOGPROB_SLACK).all())
