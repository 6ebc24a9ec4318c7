"""Means and their 95 % intervals: of accuracies, of counts per token, and of both over several runs.

===================== ==================================================== ==========================================
of                    interval                                             shown by
===================== ==================================================== ==========================================
avg@n, pass@k         BCa bootstrap over problems (``average``,            the summary of ``eval``, and the tables of
                      ``pass_at``): several responses to a problem         ``reproduce``
one accuracy          Wilson at the effective size                         the report: also right at 0 and 100 %, with
                      (``accuracy_interval``)                              one greedy response per problem
before and after      normal, of the differences per problem               the report
                      (``paired_interval``)
mean over tokens      studentized bootstrap over problems                  distances in the summary of ``eval``
                      (``token_mean``): KLs are skewed
its change            the same, of both means' deviations per problem      the report's first sentence
                      (``token_mean_change``)
several seeds         percentiles, seeds and problems resampled alike      ``compare``: an interval over problems alone
                      (``over_seeds``)                                     says nothing of another seed
===================== ==================================================== ==========================================

All take the problem, not the response or the token, as the unit that is drawn: those of one problem are alike. So the
same accuracy has other ends in ``evaluate``, ``report`` and ``compare``: each answers the question in its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
NORMAL = NormalDist()
Z_95 = NORMAL.inv_cdf((1 + LEVEL) / 2)
ProblemTable = npt.NDArray[np.float64]
_Drawn = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float


def average(correct: Sequence[Sequence[bool]], *, seed: int = 0) -> Estimate:
    """avg@n: the mean over problems of the share of right responses (accuracy of one response, measured n times)."""
    return _bootstrap(np.array([np.mean(marks) for marks in correct]), seed)


def pass_at(k: int, correct: Sequence[Sequence[bool]], *, seed: int = 0) -> Estimate:
    """pass@k: the chance that one of k responses is right, without bias from n ≥ k (Chen et al. 2021, eq. 1).

    Raises:
        ValueError: a problem has fewer than k responses.
    """
    return _bootstrap(np.array([pass_probability(len(m), sum(m), k) for m in correct]), seed)


def token_mean(
    sums: Sequence[float], tokens: Sequence[float], *, bounds: tuple[float, float], seed: int = 0
) -> Estimate:
    """A mean over tokens: Σ sums / Σ tokens over problems, each with the sum over its tokens and their number.

    Tokens of one problem are alike, so that problems are resampled. The interval is studentized (Efron and Tibshirani
    1993, §12.5, with the standard error of a ratio): KLs are so skewed that percentiles, BCa too, cover 0.86 to 0.92 with
    16 to 64 problems. Where nearly all problems are alike its ends are percentiles. They are NaN with fewer than three
    problems.

    Args:
        bounds: between which such a mean lies.
    """
    totals, counts = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    value = float(totals.sum() / counts.sum()) if counts.sum() else math.nan
    return _studentized(value, len(totals), lambda drawn: _ratio(totals[drawn], counts[drawn]), bounds, seed)


def token_mean_change(
    before: tuple[Sequence[float], Sequence[float]],
    after: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int = 0,
) -> Estimate:
    """A mean over tokens after minus before, and the interval of ``token_mean``: problems are resampled with both.

    Args:
        before, after: per problem the sum over its tokens, and their number; the same problems in both.
    """
    totals = np.asarray([before[0], after[0]], dtype=np.float64)
    counts = np.asarray([before[1], after[1]], dtype=np.float64)

    def change(drawn: _Drawn) -> tuple[ProblemTable, ProblemTable]:
        ratios, deviations = _deviations(totals[:, drawn], counts[:, drawn])
        sizes = np.abs(totals[:, drawn] / counts.sum(axis=-1, keepdims=True)[:, None]).sum(axis=0)
        return ratios[1] - ratios[0], _error(deviations[1] - deviations[0], sizes)

    value = float(np.subtract(*(totals.sum(axis=1) / counts.sum(axis=1))[::-1]))
    return _studentized(value, totals.shape[1], change, (-math.inf, math.inf), seed)


def _studentized(
    value: float,
    problems: int,
    statistic: Callable[[_Drawn], tuple[ProblemTable, ProblemTable]],
    bounds: tuple[float, float],
    seed: int,
) -> Estimate:
    """The interval of ``token_mean``, of a statistic and its standard error over drawn problems ``[…, problems]``."""
    if problems < 3:
        return Estimate(value, math.nan, math.nan)
    error = float(statistic(np.arange(problems)[None])[1][0])
    if not error > 0.0:
        return Estimate(value, value, value)
    generator = np.random.Generator(np.random.PCG64(seed))
    found, errors = statistic(generator.integers(problems, size=(RESAMPLES, problems)))
    varied = errors > 0.0
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # Few problems differ from the others, and many resamples have none of them: no error to divide by. (Of three, a
    # ninth of the resamples have one alone, whatever their values.)
    if problems > 3 and varied.mean() < tails[1]:
        ends = np.clip(np.quantile(found, tails), *bounds)
        return Estimate(value, float(ends[0]), float(ends[1]))
    quotients = (found[varied] - value) / errors[varied]
    least, most = np.quantile(quotients, tails)
    low, high = (float(np.clip(value - q * error, *bounds)) for q in (most, least))
    return Estimate(value, low, high)


def _ratio(totals: ProblemTable, counts: ProblemTable) -> tuple[ProblemTable, ProblemTable]:
    """Σ totals / Σ counts over the last axis ``[…, problems]``, and its linearized standard error (0: nothing varies)."""
    ratios, deviations = _deviations(totals, counts)
    return ratios, _error(deviations, totals / counts.sum(axis=-1, keepdims=True))


def _deviations(totals: ProblemTable, counts: ProblemTable) -> tuple[ProblemTable, ProblemTable]:
    """Σ totals / Σ counts over the last axis, and each problem's part in its deviation, linearized."""
    tokens = counts.sum(axis=-1)
    ratios = totals.sum(axis=-1) / tokens
    return ratios, (totals - ratios[..., None] * counts) / tokens[..., None]


def _error(deviations: ProblemTable, sizes: ProblemTable) -> ProblemTable:
    """Standard error of a sum of problems' deviations; below a rounding of ``sizes`` it is 0."""
    problems = deviations.shape[-1]
    squares = np.square(deviations).sum(axis=-1)
    squares = np.where(squares > 1e-20 * np.square(sizes).sum(axis=-1), squares, 0.0)
    errors: ProblemTable = np.sqrt(squares * problems / (problems - 1))
    return errors


def pass_probability(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k)/C(n, k): the share of k-subsets of n responses, c of them right, that have a right one."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} responses, a problem has {n}")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def _bootstrap(values: npt.NDArray[np.float64], seed: int) -> Estimate:
    """Mean and BCa interval over problems.

    Problems are resampled, their responses with them. Percentiles are corrected for the bias of the resamples' median
    and for skewness (Efron 1987, acceleration by the jackknife): with 30 problems and a mean near 0 or 1 plain
    percentiles cover too little.
    """
    mean, count = float(values.mean()), len(values)
    if count < 2 or np.all(values == values[0]):
        return _all_alike(mean, count)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = values[generator.integers(count, size=(RESAMPLES, count))].mean(axis=1)
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / RESAMPLES
    bias = NORMAL.inv_cdf(float(np.clip(below, 1e-3, 1 - 1e-3)))
    deviations = values.mean() - (values.sum() - values) / (count - 1)
    acceleration = float((deviations**3).sum() / (6.0 * (deviations**2).sum() ** 1.5))
    ends = []
    for z in (-Z_95, Z_95):
        shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
        ends.append(float(np.quantile(means, NORMAL.cdf(shifted))))
    return Estimate(mean, ends[0], ends[1])


def _all_alike(mean: float, count: int) -> Estimate:
    """Resampling equal values shows no spread: the rule of three bounds the rest."""
    unseen = min(1.0, 3.0 / max(count, 1))
    return Estimate(mean, max(0.0, mean - unseen), min(1.0, mean + unseen))


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
    center = (share + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return max(0.0, center - half), min(1.0, center + half)


def paired_interval(differences: npt.NDArray[np.float64], z: float = Z_95) -> tuple[float, float]:
    """Normal interval of the mean of per-problem differences."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return -1.0, 1.0  # one pair says nothing about the spread
    half = z * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return max(-1.0, mean - half), min(1.0, mean + half)


def over_seeds(
    sums: ProblemTable, counts: ProblemTable, *, seed: int = 0, draws: int = RESAMPLES
) -> Estimate:
    """Σ sums / Σ counts of ``[seeds, problems]`` and its percentile interval, resampling seeds and problems alike.

    Problems are resampled once per draw for all seeds: they are the same problems.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    num_seeds, num_problems = sums.shape
    ratios = np.empty(draws)
    for draw in range(draws):
        chosen = np.ix_(
            generator.integers(num_seeds, size=num_seeds), generator.integers(num_problems, size=num_problems)
        )
        ratios[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))
