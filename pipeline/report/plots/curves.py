"""The curves of a report, with the meaning and the healthy course of each.

``CURVES`` is the whole list; adding a metric to the report is adding a line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tropd.pipeline.report.plots.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    color: str = BLUE
    smooth: bool = True


@dataclass(frozen=True)
class Curve:
    """One plot of metrics over steps. ``caption`` is its meaning, ``healthy`` the course in a good run."""

    name: str
    title: str
    lines: Sequence[Line]
    ylabel: str
    caption: str
    healthy: str
    percent: bool = False
    from_zero: bool = False
    group: Literal["distance", "main", "time", "more"] = "main"


CURVES: tuple[Curve, ...] = (
    Curve(
        "distance",
        "KL on held-out prompts",
        (
            Line("distance_reverse_kl", "reverse, on the student's responses", BLUE, smooth=False),
            Line("distance_forward_kl", "forward, on the teacher's", PURPLE, smooth=False),
        ),
        "nats per token",
        "Distance of student and teacher on prompts that are not trained on, during training: reverse KL from the "
        "student's sampled tokens (K1), forward KL from the teacher's most likely tokens and the rest.",
        "both fall, and level off well below where they began.",
        from_zero=True,
        group="distance",
    ),
    Curve(
        "distance_acceptance",
        "Acceptance on held-out prompts",
        (Line("distance_acceptance", "acceptance", BLUE, smooth=False),),
        "mean over tokens",
        "Mean of min(π_T/π_S, 1) on the student's responses to them: an estimate of Σ min(π_S, π_T).",
        "rises toward 100 %.",
        percent=True,
        group="distance",
    ),
    Curve(
        "distance_length",
        "Lengths on held-out prompts",
        (
            Line("distance_length", "student", BLUE, smooth=False),
            Line("distance_teacher_length", "teacher", PURPLE, smooth=False),
        ),
        "tokens",
        "Mean length of both's responses to them.",
        "the student's comes to the teacher's.",
        from_zero=True,
        group="distance",
    ),
    Curve(
        "accuracy",
        "Accuracy during training",
        (
            Line("accuracy_greedy", "greedy", GREEN, smooth=False),
            Line("accuracy_sampled", "sampled", BLUE, smooth=False),
        ),
        "right answers",
        "Share of held-out problems answered right, on the subset that is evaluated during training.",
        "rises and levels off; sampled comes close to greedy.",
        percent=True,
    ),
    Curve(
        "extrapolation",
        "Scores of extrapolated weights",
        (
            Line("extrapolation_score", "as updated", GREY, smooth=False),
            Line("extrapolation_score_after", "as kept", GREEN, smooth=False),
        ),
        "accuracy, or −nats per token",
        "Score on held-out problems after the steps 1, 2, 4, 8, …, of the weights that the update left, and of those "
        "that the extrapolation kept.",
        "rises; where both lines are one, no extrapolation was better.",
    ),
    Curve(
        "reward",
        "Reward",
        (
            Line("reward_mean", "mean", BLUE),
            Line("reward_groups_without_spread", "prompts without spread", GREY),
        ),
        "reward, share of prompts",
        "Mean reward of the student's responses, and the share of prompts whose responses all have the same reward: from "
        "those a comparison within the prompt learns nothing.",
        "the mean rises; prompts without spread stay below a half.",
    ),
    Curve(
        "regions",
        "Where the supervised tokens fall",
        (
            Line("region_fraction_trust", "trust region", BLUE),
            Line("region_fraction_outlier", "outliers", ORANGE),
            Line("region_fraction_guidance", "guidance", GREEN),
        ),
        "share of tokens",
        "Student tokens that the teacher accepts, those that it rejects, and the teacher's own prefix tokens.",
        "guidance falls to 0 with its schedule, outliers become rare.",
        percent=True,
        from_zero=True,
    ),
    Curve(
        "acceptance",
        "Acceptance of student tokens",
        (Line("acceptance_mean", "acceptance", BLUE),),
        "mean over tokens",
        "Mean of min(π_T/π_S, 1), the chance that the teacher accepts a student token: an estimate of "
        "1 − total-variation distance.",
        "rises toward 100 %; 100 % from the start means that student and teacher are the same model.",
        percent=True,
    ),
    Curve(
        "k1",
        "K1",
        (Line("k1_mean", "mean", BLUE),),
        "nats per token",
        "Mean of log π_S − log π_T on student tokens: a one-sample estimate of the reverse KL, student to teacher.",
        "falls to 0 from above; growth is the first sign of a collapse.",
    ),
    Curve(
        "loss_trust",
        "Loss of the trust region",
        (Line("loss_trust", "trust region", BLUE),),
        "contribution to the loss",
        "A policy-gradient surrogate: only its gradient has a meaning, its value may have either sign.",
        "shrinks toward 0 without jumps.",
    ),
    Curve(
        "loss_outlier",
        "Loss of the outliers",
        (Line("loss_outlier", "outliers", ORANGE),),
        "contribution to the loss",
        "Contribution of rejected tokens. With a truncated top-k it is not a true KL and may be negative.",
        "falls as outliers become rare.",
    ),
    Curve(
        "loss_guidance",
        "Loss of the guidance",
        (Line("loss_guidance", "guidance", GREEN),),
        "contribution to the loss",
        "Weighted negative log-likelihood of the teacher's prefix tokens.",
        "falls, and is 0 when the schedule has ended; small beside the others.",
    ),
    Curve(
        "grad_norm",
        "Gradient norm",
        (Line("grad_norm", "before clipping", BLUE),),
        "L2 norm",
        "Norm of the gradient before it is clipped; dashed, the norm that it is clipped to.",
        "the same order of magnitude throughout; clipping is for single spikes.",
        from_zero=True,
    ),
    Curve(
        "entropy",
        "Entropy",
        (Line("student_entropy", "student", BLUE), Line("teacher_entropy", "teacher", PURPLE)),
        "nats per token",
        "Entropy of the student on its own tokens, and of the teacher where the objective asks for it.",
        "falls slowly toward the teacher's; a fall to 0 is a collapse, a rise means lost skill.",
        from_zero=True,
    ),
    Curve(
        "prefix_length",
        "Teacher prefix",
        (
            Line("prefix_length_scheduled", "scheduled", GREY, smooth=False),
            Line("prefix_length_mean", "mean used", GREEN, smooth=False),
        ),
        "tokens",
        "Tokens of a teacher trajectory that the student continues from. Short trajectories give less than scheduled.",
        "goes from its start to 0: training ends fully on-policy.",
        from_zero=True,
    ),
    Curve(
        "response_length",
        "Response length",
        (Line("response_length_mean", "mean", BLUE),),
        "tokens",
        "Tokens per response, with the teacher prefix that it continues.",
        "steady; runaway length goes with truncation and repetition.",
        from_zero=True,
    ),
    Curve(
        "truncated",
        "Truncated responses",
        (Line("truncated_fraction", "truncated", RED),),
        "share of responses",
        "Responses that reached the length limit without an end.",
        "stays low; a rise means that responses run away.",
        percent=True,
        from_zero=True,
    ),
    Curve(
        "teacher_tokens",
        "Tokens asked of the teacher",
        (
            Line("teacher_tokens_scored", "scored", PURPLE),
            Line("teacher_topk_tokens", "with top-k", ORANGE),
        ),
        "tokens per step",
        "Student tokens that the teacher scored, and those of them that it returned alternatives for.",
        "every student token is scored once; top-k is asked for outliers only.",
        from_zero=True,
    ),
    Curve(
        "teacher_bytes",
        "Bytes to and from the teacher",
        (
            Line("teacher_bytes_received", "received", PURPLE),
            Line("teacher_bytes_sent", "sent", GREY),
        ),
        "bytes per step",
        "Size of the scoring service's answers and of the requests.",
        "received falls with the share of outliers.",
        from_zero=True,
    ),
    Curve(
        "step_time",
        "Time per step",
        (
            Line("time_rollout", "rollout", BLUE),
            Line("time_score", "scoring", PURPLE),
            Line("time_train", "forward and backward", ORANGE),
            Line("time_wait", "training waits", GREY),
        ),
        "seconds",
        "Sampling, the teacher's answers, forward and backward; how long training waited for the first two.",
        "steady; a growing wait for the teacher asks for a bigger service.",
        from_zero=True,
        group="time",
    ),
    Curve(
        "loss",
        "Loss",
        (Line("loss", "loss", BLUE),),
        "loss",
        "Sum of the regions' contributions; its value mixes a surrogate and divergences.",
        "no jumps; judge progress by accuracy, acceptance and K1 instead.",
        group="more",
    ),
    Curve(
        "k1_extremes",
        "Extremes of K1",
        (
            Line("k1_max", "largest", BLUE),
            Line("k1_min", "smallest", RED),
        ),
        "nats",
        "The single most extreme log-ratios of each step: they would dominate a plain policy gradient.",
        "bounded; extremes that keep growing come before a collapse.",
        group="more",
    ),
    Curve(
        "k1_regions",
        "K1 by region",
        (Line("k1_trust", "trust region", BLUE), Line("k1_outlier", "outliers", ORANGE)),
        "nats per token",
        "The mean log-ratio of accepted and of rejected tokens.",
        "trust region near 0 or below; outliers stay bounded.",
        group="more",
    ),
    Curve(
        "grad_norm_regions",
        "Gradient norm by region",
        (
            Line("grad_norm_trust", "trust region", BLUE),
            Line("grad_norm_outlier", "outliers", ORANGE),
            Line("grad_norm_guidance", "guidance", GREEN),
        ),
        "L2 norm",
        "The gradient of each region's loss alone.",
        "no region drowns the others.",
        from_zero=True,
        group="more",
    ),
    Curve(
        "topk",
        "Top-k of student and teacher",
        (
            Line("topk_overlap", "overlap", BLUE),
            Line("topk_student_mass", "student's mass", ORANGE),
            Line("topk_teacher_mass", "teacher's mass", PURPLE),
        ),
        "share",
        "Overlap of both top-k sets, and each model's probability on the teacher's.",
        "overlap and student's mass rise toward the teacher's; a low teacher's mass asks for a larger k.",
        percent=True,
        group="more",
    ),
    Curve(
        "importance",
        "Importance ratios",
        (Line("importance_mean", "mean", BLUE), Line("importance_max", "largest", RED)),
        "ratio",
        "π_θ/μ: probability of the student's tokens in the trainer, relative to the sampler μ.",
        "1 but for rounding, unless rollouts come from another engine or older weights.",
        group="more",
    ),
    Curve(
        "sampler_difference",
        "Trainer and sampler",
        (Line("sampler_logprob_difference_max", "largest difference", RED),),
        "nats",
        "Largest difference of a token's log-prob between the two.",
        "rounding only, about 1e−5 in float32 and 1e−2 in bfloat16.",
        from_zero=True,
        group="more",
    ),
    Curve(
        "memory_phases",
        "Peak memory of each phase",
        (
            Line("memory_peak_rollout", "rollout", BLUE, smooth=False),
            Line("memory_peak_score", "scoring", PURPLE, smooth=False),
            Line("memory_peak_train", "forward and backward", ORANGE, smooth=False),
        ),
        "bytes",
        "The most that a process had in each phase of the step: of its GPU, or on a CPU of main memory.",
        "flat after the longest response has been seen; the largest is the phase to make smaller.",
        from_zero=True,
        group="time",
    ),
    Curve(
        "mfu",
        "Model FLOPs utilization",
        (Line("mfu_train", "forward and backward", ORANGE),),
        "share of the GPUs' peak",
        "Operations that forward and backward need, nothing counted twice, per second, of those that the GPUs could do.",
        "steady.",
        percent=True,
        from_zero=True,
        group="time",
    ),
    Curve(
        "memory",
        "Memory",
        (
            Line("memory_rss", "main memory", GREY, smooth=False),
            Line("memory_gpu_peak", "GPU, at most", PURPLE, smooth=False),
        ),
        "bytes",
        "Of the training process at the end of each step; the most of its GPU during it.",
        "flat after the longest response has been seen.",
        from_zero=True,
        group="more",
    ),
    Curve(
        "learning_rate",
        "Learning rate",
        (Line("learning_rate", "learning rate", GREY, smooth=False),),
        "learning rate",
        "As scheduled.",
        "the configured course.",
        from_zero=True,
        group="more",
    ),
    Curve(
        "tokens",
        "Supervised tokens",
        (
            Line("tokens_supervised", "with a loss", GREY),
            Line("tokens_on_policy", "student's", BLUE),
            Line("tokens_guidance", "prefix", GREEN),
        ),
        "tokens per step",
        "Tokens that the student wrote, prefix tokens, and those of both that carry a loss.",
        "steady in sum while the prefix gives way to the student's own tokens.",
        from_zero=True,
        group="more",
    ),
)
