"""Settings of the extrapolation: which weights go how far, and the score that decides."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tropd.pipeline.objectives.spec import MOST_FACTOR, Spec


class Extrapolation(Spec):
    """Weights beyond the update, after the steps 1, 2, 4, 8, …: θ + f·(θ - θ_base), while held-out problems are answered
    better; what stays is the next θ_base, at first the student as it was (EffOPD)."""

    score: Literal["accuracy", "reverse_kl"] = "accuracy"
    """`accuracy`: the share of right answers, one sampled response per problem; `reverse_kl`: minus the student's KL to
    its teacher, per token of its own responses."""
    problems: str = ""
    """The problems: the name of one of evaluation.benchmarks, or those of [evaluation] itself if empty; the run's final
    accuracy on them then is no longer that of unseen problems."""
    most: int = Field(default=64, ge=1, le=1_000_000)
    """Problems per score, spread over all of these. Up to 1 + `attempts` scores are taken each time."""
    factor: float = Field(default=2.0, gt=0.0, le=MOST_FACTOR)
    """f of the first attempt; after each that is accepted it is f/(1+f), so that all go equally far."""
    attempts: int = Field(default=5, ge=1, le=1000)
    """Most attempts at a step; the first that scores no better is undone, and ends them."""
    parameters: tuple[str, ...] = Field(
        default=("attn", "attention", "mlp", "ffn", "feed_forward"), min_length=1
    )
    """A trained parameter with one of these in its name (in lower case) is extrapolated; others stay as the update left
    them. So it is attention and MLPs, without embeddings and output layer."""
