"""Time estimate of a run: a measurement of seconds on its own models, and arithmetic from there.

The measurement samples from the teacher and trains the student on a few tokens. Other rates follow from the models'
sizes: sampling and scoring take time in proportion to the parameters, and a forward pass is a third of a training pass.
It is an estimate: a busy machine, or responses of another length than those measured, take several times as long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import mean

import torch

from tropd.pipeline.config.schema import Config
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.base import Generation, Sampling
from tropd.pipeline.models.loading import context_length, load_model, num_parameters
from tropd.pipeline.models.runtime import DTYPES, autocast, configure_runtime
from tropd.pipeline.objectives.needs import needed_data, teacher_needs
from tropd.pipeline.problems.prompts import scan_prompts
from tropd.pipeline.run.opening import LoadedModel, load_role
from tropd.pipeline.run.run import Run

ROWS = 8
"""Prompts that the teacher answers."""
TOKENS = 96
"""Most tokens of an answer."""
MOST_STOP = 0.75
TRAINED = (4, 64)
"""Rows and columns of the batch that the student is trained on."""
EVALUATIONS = "evaluations while training"
EXTRAPOLATIONS = "extrapolations, at most"


@dataclass(frozen=True)
class Rates:
    """Tokens per second on this machine."""

    teacher_sampling: float
    teacher_scoring: float
    student_sampling: float
    student_training: float
    lengths: tuple[int, ...]
    """Tokens of the teacher's responses."""
    stopped: bool
    """Whether nearly all of these came to their end."""
    teacher_loading: float
    """Seconds until it is ready, as is the next."""
    student_loading: float

    @property
    def student_scoring(self) -> float:
        """A forward pass is a third of a training pass."""
        return 3 * self.student_training

    def expected_length(self, most: int) -> float:
        """Tokens of a response of at most ``most``: the mean of those measured, or all where many of these were cut."""
        return min(float(most), mean(self.lengths)) if self.stopped else float(most)


@dataclass(frozen=True)
class Amounts:
    """Amounts of work: prompts, tokens, rows."""

    prompts: int
    problems: int
    prompt_length: float
    """Mean, in tokens."""


def measure_rates(run: Run, prompts: Sequence[Sequence[int]]) -> Rates:
    """Sample a few responses of the teacher and train the student once; nothing is written.

    Args:
        prompts: token ids; the first few are answered.

    Raises:
        ConfigError, DataError, MemoryFullError: a model cannot be loaded.
    """
    began = time.perf_counter()
    teacher = load_role(run, "teacher")
    teacher_loading, teacher_size = time.perf_counter() - began, num_parameters(teacher.model)
    sampling, answers = _sampling_rate(teacher, [list(tokens) for tokens in prompts[:ROWS]])
    del teacher
    training, student_size, student_loading = _training_rate(run)
    ratio = student_size / teacher_size
    return Rates(
        teacher_sampling=sampling,
        teacher_scoring=3 * training * ratio,
        student_sampling=sampling / ratio,
        student_training=training,
        lengths=tuple(len(one.tokens) for one in answers),
        stopped=mean(one.finish_reason == "stop" for one in answers) >= MOST_STOP,
        teacher_loading=teacher_loading,
        student_loading=student_loading,
    )


def _sampling_rate(teacher: LoadedModel, prompts: list[list[int]]) -> tuple[float, list[Generation]]:
    """Tokens per second of the teacher, and its responses."""
    engine = teacher.engine(batch_size=ROWS)
    seeds = list(range(len(prompts)))
    engine.generate(prompts, Sampling(), seeds=seeds, max_tokens=[2] * len(prompts))  # prepares the weights
    began = time.perf_counter()
    answers = engine.generate(prompts, Sampling(), seeds=seeds, max_tokens=[TOKENS] * len(prompts))
    seconds = time.perf_counter() - began
    return sum(len(one.tokens) for one in answers) / seconds, answers


def _training_rate(run: Run) -> tuple[float, int, float]:
    """Tokens per second of forward and backward pass, the student's parameters, and the seconds of loading them."""
    settings = run.config.student
    device = configure_runtime(run.config.runtime)
    folder = model_directory(run.workspace, settings, "student")
    started = time.perf_counter()
    model = load_model(folder, dtype="float32", device=device, trust_remote_code=settings.trust_remote_code)
    loading = time.perf_counter() - started
    precision = None if settings.settled_dtype == "float32" else DTYPES[settings.settled_dtype]
    columns = min(TRAINED[1], context_length(model.config))
    rows = torch.arange(TRAINED[0] * columns, device=device).reshape(TRAINED[0], columns)
    rows = rows % model.get_input_embeddings().num_embeddings
    seconds = []
    for _ in range(2):  # the first one is slower
        began = time.perf_counter()
        with autocast(device, precision):
            logits = model(input_ids=rows, use_cache=False).logits
        logits.float().logsumexp(-1).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    return rows.numel() / min(seconds), num_parameters(model), loading


def seconds_of_stages(config: Config, rates: Rates, amounts: Amounts) -> dict[str, float]:
    """Seconds of each stage, by the configuration and the rates; and the parts of ``train``: ``a step``, all evaluations
    along the way, and all extrapolations.

    Each stage loads its models anew. What the run does not do is left out. Training is counted as if the student
    wrote every token itself: teacher prefixes make early steps faster.
    """
    prefixes = min(
        amounts.prompts, config.data.limit or amounts.prompts, config.prefixes.limit or amounts.prompts
    )
    written = prefixes * config.prefixes.samples_per_prompt
    length = rates.expected_length(config.prefix_max_tokens)
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    own = rates.expected_length(config.rollout.max_tokens)
    read = rows * (amounts.prompt_length + own)
    step = rows * own / rates.student_sampling + read / rates.student_training + read / rates.teacher_scoring
    problems = min(amounts.problems, config.evaluation.limit or amounts.problems)
    answer = rates.expected_length(config.evaluation_max_tokens)
    answers = problems * (1 + config.evaluation.samples)
    rates_of = (rates.student_sampling, rates.student_sampling, rates.teacher_sampling)
    aside = {
        EVALUATIONS: _evaluations(config, rates, amounts.prompt_length, problems),
        EXTRAPOLATIONS: _extrapolations(config, rates, amounts.prompt_length, problems),
    }
    needed = needed_data(config.objective)
    data = {
        "prefixes": ("generate-prefixes", rates.teacher_loading + written * length / rates.teacher_sampling),
        "scores": (
            "score-teacher",
            rates.teacher_loading + written * (amounts.prompt_length + length) / rates.teacher_scoring,
        ),
    }
    needs = teacher_needs(config.objective)
    taught = config.train.evaluate_every or (needs.token_logprobs and config.objective.rollouts == "student")
    students = 2  # before and after training
    times_loaded = 2 if config.evaluation.distance_prompts else 1  # to answer, and to be compared
    by_teacher, by_student = _distances(config, rates, amounts.prompt_length, problems)
    return {
        **dict(data[folder] for folder in needed if folder in data),
        "a step": step,
        **{name: seconds for name, seconds in aside.items() if seconds},
        "train": rates.student_loading
        + (rates.teacher_loading if taught else 0.0)
        + config.train.steps * step
        + sum(aside.values()),
        "evaluate": rates.teacher_loading
        + students * times_loaded * rates.student_loading
        + sum(answers * answer / rate for rate in rates_of)
        + by_teacher
        + students * by_student,
    }


def _distances(config: Config, rates: Rates, prompt_length: float, problems: int) -> tuple[float, float]:
    """Seconds of the teacher's part in distances on held-out prompts, and of that of one state of the student.

    Where responses of the distance serve for the accuracy too (``evaluation.temperature = 1``), they are counted twice.
    """
    answer = rates.expected_length(config.evaluation_max_tokens)
    compared = min(problems, config.evaluation.distance_prompts)
    read = compared * (prompt_length + answer)
    # The teacher scores the student's responses, and the student the teacher's.
    scored = read / rates.teacher_scoring + read / rates.student_scoring
    by_teacher = compared * answer / rates.teacher_sampling + read / rates.teacher_scoring
    return by_teacher, compared * answer / rates.student_sampling + scored


def _evaluations(config: Config, rates: Rates, prompt_length: float, problems: int) -> float:
    """Of all evaluations along the way (``train.evaluate_every``), and the teacher's responses before the first step."""
    train = config.train
    if not train.evaluate_every:
        return 0.0
    answer = rates.expected_length(config.evaluation_max_tokens)
    before, compared = _distances(config, rates, prompt_length, problems)
    graded = min(problems, train.evaluate_problems) if config.data.answer_field else 0
    each = compared + 2 * graded * answer / rates.student_sampling  # greedy and sampled
    return before + ceil(train.steps / train.evaluate_every) * each


def _extrapolations(config: Config, rates: Rates, prompt_length: float, problems: int) -> float:
    """Of the scores of ``objective.extrapolation``, as if every attempt were accepted."""
    settings = config.objective.extrapolation
    if settings is None:
        return 0.0
    # Problems of another set are not counted before it is read.
    scored = settings.most if settings.problems else min(problems, settings.most)
    by_teacher = settings.score == "reverse_kl"
    own = config.evaluation_sets[settings.problems].max_tokens or config.rollout.max_tokens
    answer = rates.expected_length(config.evaluation_max_tokens if by_teacher else own)
    seconds = answer / rates.student_sampling
    if by_teacher:
        seconds += (prompt_length + answer) / rates.teacher_scoring
    searches = config.train.steps.bit_length()  # after the steps 1, 2, 4, 8, …
    return searches * (1 + settings.attempts) * scored * seconds


def estimate(run: Run, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Measure, and estimate the seconds of each stage of a run.

    Args:
        prompts: its first training prompts as token ids.

    Raises:
        ConfigError, DataError: models or prompts cannot be read, or no prompts exist.
    """
    data = run.config.data
    trained, _ = scan_prompts(run.workspace.resolve(data.prompts), data)
    asked, _ = scan_prompts(run.workspace.resolve(data.evaluation), data)
    lengths = sum(map(len, prompts)) / len(prompts)
    return seconds_of_stages(
        run.config, measure_rates(run, prompts), Amounts(len(trained), len(asked), lengths)
    )


def rounded_duration(seconds: float) -> str:
    """Seconds as text, such as ``12 s``, ``3 min`` or ``1.5 h``."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
