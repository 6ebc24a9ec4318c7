"""Partition rules: which student tokens are trusted, and which are outliers.

Pure functions over flat arrays of T tokens (numpy): the teacher service and the trainer call the same code on
the same numbers, so both draw the same regions. Weights are data, never differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tropd.pipeline.objectives.partition_specs import Partition
from tropd.storage.arrays import Floats32


@dataclass(frozen=True)
class Regions:
    """Weights ``[T]`` in [0, 1] with which each token belongs to the trust region and to the outliers."""

    trust: Floats32
    outlier: Floats32


def acceptance(student_logprobs: Floats32, teacher_logprobs: Floats32) -> npt.NDArray[np.float64]:
    """P_trust = min(π_T/π_S, 1) per sampled token (arXiv 2606.01249; the rule of speculative decoding).

    A teacher log-prob of -inf gives 0. Computed in float64 from float32 log-probs.
    """
    teacher = teacher_logprobs.astype(np.float64)
    return np.exp(np.minimum(teacher - student_logprobs.astype(np.float64), 0.0))


def partition_tokens(
    partition: Partition,
    *,
    student_logprobs: Floats32,
    teacher_logprobs: Floats32,
    uniforms: npt.NDArray[np.float64] | None = None,
    teacher_entropy: Floats32 | None = None,
    correct: npt.NDArray[np.bool_] | None = None,
) -> Regions:
    """Apply a partition rule to T sampled tokens.

    Args:
        student_logprobs: ``[T]``, finite: the student sampled these tokens.
        teacher_logprobs: ``[T]``, may be -inf.
        uniforms: ``[T]`` in [0, 1), for rule ``sampled``: trust iff u ≤ P_trust.
        teacher_entropy: ``[T]`` nats, for rule ``teacher_entropy``.
        correct: ``[T]`` whether the token's row is right, for rule ``reward``.

    Raises:
        ValueError: the rule needs an input that is not given.
    """
    ones = np.ones(len(student_logprobs), dtype=np.float32)
    zeros = np.zeros_like(ones)
    if partition.rule == "all":
        return Regions(ones, zeros)
    if partition.rule == "none":
        return Regions(zeros, ones)
    if partition.rule == "teacher_entropy":
        if teacher_entropy is None:
            raise ValueError("partition rule 'teacher_entropy' needs the teacher's entropy")
        return Regions(ones, (teacher_entropy >= partition.threshold).astype(np.float32))
    if partition.rule == "reward":
        if correct is None:
            raise ValueError("partition rule 'reward' needs to know which rows are right")
        return Regions(correct.astype(np.float32), (~correct).astype(np.float32))
    if partition.rule == "sign":
        margin = np.exp(teacher_logprobs.astype(np.float64)) - np.exp(student_logprobs.astype(np.float64))
        trust = (margin > partition.margin).astype(np.float32)
        return Regions(trust, np.float32(1.0) - trust)
    probability = acceptance(student_logprobs, teacher_logprobs)
    if partition.rule == "expected":
        trust = probability.astype(np.float32)
    elif partition.rule == "ratio":
        trust = (probability >= partition.threshold).astype(np.float32)
    else:
        if uniforms is None:
            raise ValueError("partition rule 'sampled' needs uniform numbers")
        # u ≤ P and P > 0: a token that the teacher gives no probability is never trusted, even at u = 0.
        trust = ((uniforms <= probability) & (probability > 0.0)).astype(np.float32)
    return Regions(trust, np.float32(1.0) - trust)
