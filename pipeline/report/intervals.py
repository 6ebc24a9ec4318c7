"""Uncertainty of accuracies: intervals for responses that are clustered by problem."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054


def accuracy_interval(
    problem_means: npt.NDArray[np.float64], samples: int, z: float = Z_95
) -> tuple[float, float]:
    """Wilson score interval of the mean of ``problem_means`` (share of right responses per problem).

    Several responses to one problem are not independent, so the interval is taken at the effective sample
    size p(1-p)/Var(mean), with the variance between problems. It is the number of problems when each has one
    response, and at most ``samples``. Where every response is right (or wrong) the data cannot tell how
    alike they are, and only the problems are counted.
    """
    problems = len(problem_means)
    mean = float(np.mean(problem_means))
    variance = float(np.var(problem_means)) / problems
    if mean in (0.0, 1.0):
        effective = float(problems)
    elif variance * samples <= mean * (1 - mean):
        effective = float(samples)
    else:
        effective = mean * (1 - mean) / variance
    return wilson(mean, effective, z)


def wilson(share: float, size: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a binomial share."""
    shrink = 1 + z * z / size
    centre = (share + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(differences: npt.NDArray[np.float64], z: float = Z_95) -> tuple[float, float]:
    """Normal interval of the mean of per-problem differences."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return -1.0, 1.0  # one pair says nothing about the spread
    half = z * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return max(-1.0, mean - half), min(1.0, mean + half)
