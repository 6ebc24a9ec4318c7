"""The configuration: every section and the rules between them. The sections are in ``sections``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from tropd.pipeline.config.sections.data_settings import DataConfig, PrefixesConfig, ScoresConfig
from tropd.pipeline.config.sections.evaluation_settings import Benchmark, DemoConfig, EvaluationConfig
from tropd.pipeline.config.sections.model_settings import (
    RuntimeConfig,
    ServiceConfig,
    StudentConfig,
    TeacherConfig,
    VllmConfig,
)
from tropd.pipeline.config.sections.reward_settings import RewardConfig
from tropd.pipeline.config.sections.training_settings import RolloutConfig, RunConfig, SftConfig, TrainConfig
from tropd.pipeline.objectives.needs import learns_by_comparison_alone, teacher_needs
from tropd.pipeline.objectives.objective import Importance, Objective, entropy_part, needs_rewards
from tropd.pipeline.objectives.spec import Apart, Inert, Spec

AS_FETCHED = {
    "id_field": "id",
    "prompt_field": "prompt",
    "answer_field": "answer",
    "template": "{prompt}",
}
"""How the questions are read that ``tropd fetch`` writes for lighteval's benchmarks."""


class Config(Spec):
    """Everything that a run depends on."""

    run: Apart[RunConfig] = RunConfig()
    runtime: Inert[RuntimeConfig] = RuntimeConfig()
    data: DataConfig = DataConfig()
    teacher: Apart[TeacherConfig] = TeacherConfig()
    student: Apart[StudentConfig] = StudentConfig()
    prefixes: PrefixesConfig = PrefixesConfig()
    scores: ScoresConfig = ScoresConfig()
    service: Inert[ServiceConfig] = ServiceConfig()
    vllm: Apart[VllmConfig] = VllmConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: Objective
    reward: Apart[RewardConfig] = RewardConfig()
    sft: Apart[SftConfig] = SftConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    demo: DemoConfig = DemoConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if reasons := list(_conflicts(self)):
            raise ValueError("\n".join(reasons))
        return self

    @property
    def training_objective(self) -> Objective:
        """The objective, with the correction for rollouts from another distribution."""
        objective = self.objective
        if not self.rollouts_differ or objective.importance.clip is not None:
            return objective
        return objective.model_copy(update={"importance": Importance(clip=self.train.importance_clip)})

    @property
    def rollouts_differ(self) -> bool:
        """True if the student samples its responses from another distribution than the one that is trained.

        In bfloat16 it does: rounding depends on the order of sums, so on the shapes of batches, and log-probs of
        sampler and trainer are some hundredths apart. Stored responses are no samples of this run: an objective that
        trains on them says itself how it weighs them.
        """
        if self.objective.rollouts != "student":
            return False
        student = self.student
        exact = student.engine == "transformers" and student.dtype != "bfloat16"
        return not exact or not self.rollout.plain or self.train.max_staleness > 0

    @property
    def prefix_max_tokens(self) -> int:
        return self.prefixes.max_tokens or self.rollout.max_tokens

    @property
    def evaluation_max_tokens(self) -> int:
        return self.evaluation.max_tokens or self.rollout.max_tokens

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """Those that are measured: all, but for those that run a model's code without evaluation.allow_code."""
        allowed = self.evaluation.allow_code
        return tuple(one for one in self.evaluation.benchmarks if allowed or not one.runs_code)

    @property
    def evaluation_sets(self) -> dict[str, EvaluationConfig]:
        """Settings of each set of problems by name; that of [evaluation] itself has an empty name."""
        sets = {"": self.evaluation.model_copy(update={"benchmarks": (), "harness": ()})}
        for benchmark in self.benchmarks:
            own = {n: v for n, v in benchmark if v is not None and n in EvaluationConfig.model_fields}
            if benchmark.lighteval is not None:  # which judges later
                own["grader"] = "exact"
            sets[benchmark.name] = sets[""].model_copy(update=own)
        return sets

    @property
    def problem_files(self) -> dict[str, DataConfig]:
        """Location of each set's problems, as ``evaluation``, and how they are read."""
        files = {"": self.data}
        for benchmark in self.benchmarks:
            own: dict[str, Any] = {
                n: v for n, v in benchmark if v is not None and n in DataConfig.model_fields and n != "limit"
            }
            if benchmark.lighteval is not None:
                own |= AS_FETCHED
            files[benchmark.name] = self.data.model_copy(update=own | {"evaluation": benchmark.problems})
        return files


def to_plain(spec: Spec) -> dict[str, Any]:
    """A specification as plain nested dicts, lists and scalars."""
    return spec.model_dump(mode="json")


def _conflicts(config: Config) -> Iterator[str]:
    """A line for each reason to refuse settings of several sections: why, and what to set instead.

    Only reasons that follow from the settings alone; the stages refuse those that need files, models or the machine.
    """
    yield from _length_conflicts(config)
    yield from _teacher_conflicts(config)
    yield from _reward_conflicts(config)
    yield from _training_conflicts(config)
    yield from _follow_conflicts(config)
    yield from _extrapolation_conflicts(config)
    yield from _evaluation_conflicts(config)
    yield from _problem_conflicts(config)


def _length_conflicts(config: Config) -> Iterator[str]:
    longest = config.rollout.max_tokens
    if config.prefix_max_tokens > longest:
        yield (
            f"prefixes.max_tokens ({config.prefix_max_tokens}) is above rollout.max_tokens ({longest}): the student "
            "could not continue such a prefix; lower prefixes.max_tokens"
        )
    room = config.vllm.max_model_len
    if room is None or "vllm" not in (config.teacher.engine, config.teacher.scorer, config.student.engine):
        return
    for name, most in {
        "rollout.max_tokens": longest,
        "evaluation.max_tokens": config.evaluation_max_tokens,
    }.items():
        if most >= config.vllm.room(room):
            yield (
                f"{name} ({most}) leaves no token for a prompt in vllm.max_model_len ({room}), of which one is for "
                f"scoring: lower {name}, or raise vllm.max_model_len"
            )


def _teacher_conflicts(config: Config) -> Iterator[str]:
    objective = config.objective
    needs = teacher_needs(objective)
    cached = needs.cached_topk or (objective.rollouts == "stored" and needs.topk != "none")
    if cached and objective.k > config.scores.k:
        yield (
            f"objective.k ({objective.k}) is above scores.k ({config.scores.k}): the student learns from the "
            "cache, which does not hold that many alternatives; lower objective.k, or raise scores.k"
        )
    if objective.rollouts == "stored" and objective.importance.clip is not None and not config.rollout.plain:
        yield (
            "objective.importance.clip with stored rollouts needs rollout.temperature = 1 and rollout.top_p = 1: "
            "stored log-probs are those at temperature 1"
        )
    if objective.rollouts != "student":
        return
    started = [teacher for teacher in (config.teacher, *config.teacher.by_domain) if not teacher.urls]
    if needs.entropy and any(teacher.scorer == "vllm" for teacher in started):
        yield (
            f"objective.{entropy_part(objective)} needs the teacher's full-vocabulary entropy, which vLLM does not give "
            "(teacher.engine scores too, unless teacher.scoring_engine is set): set teacher.scoring_engine = "
            f"'transformers' (in teacher.by_domain too), or another objective.{entropy_part(objective).split()[0]}"
        )
    if needs.chosen and any(teacher.scorer == "vllm" for teacher in started):
        yield (
            "objective.alternatives = 'student' asks the teacher for log-probs of the student's likeliest ids, and vLLM "
            "reports those of its own (teacher.engine scores too, unless teacher.scoring_engine is set): set "
            "teacher.scoring_engine = 'transformers' (in teacher.by_domain too), or objective.alternatives = 'teacher'"
        )
    if started and config.service.max_request_tokens <= config.rollout.max_tokens:
        yield (
            f"service.max_request_tokens ({config.service.max_request_tokens}) is too low for a prompt and a response of "
            f"rollout.max_tokens ({config.rollout.max_tokens}): raise service.max_request_tokens"
        )


def _reward_conflicts(config: Config) -> Iterator[str]:
    reward, objective = config.reward, config.objective
    for name in ("function", "field"):
        given = getattr(reward, name) is not None
        if given != (reward.source == name):
            yield (
                f"reward.source = {reward.source!r} and reward.{name} do not go together: set reward.source = {name!r}, "
                f"or leave reward.{name} out"
                if given
                else f"reward.source = {name!r} needs reward.{name}: set it, or reward.source = 'grader'"
            )
    if reward.file is not None and reward.source != "field":
        yield (
            f"reward.file is read with reward.source = 'field' only (it is {reward.source!r}): set reward.source = "
            "'field', or leave reward.file out"
        )
    if not needs_rewards(objective):
        return
    alone = config.rollout.samples_per_prompt == 1 and reward.per == "row"
    if alone and learns_by_comparison_alone(objective):
        yield (
            "rollout.samples_per_prompt = 1 leaves rewards nothing to compare a response with, and "
            "objective.reward.distillation = 0 no other loss, so nothing would be trained: set "
            "rollout.samples_per_prompt = 2 or more, or objective.reward.distillation above 0"
        )
    if reward.source == "grader" and not config.data.answer_field:
        yield (
            f"objective {objective.name!r} needs rewards, and reward.source = 'grader' answers to grade with, but "
            "data.answer_field is empty: set data.answer_field, or reward.source = 'function'"
        )
    if reward.source == "grader" and reward.per == "token":
        yield "reward.per = 'token' needs reward.source = 'function' or 'field': the grader judges whole responses"
    if reward.source == "field" and objective.rollouts != "stored":
        yield (
            f"reward.source = 'field' needs objective.rollouts = 'stored' (it is {objective.rollouts!r}): responses that "
            "are sampled while training have no such field; set reward.source = 'function' or 'grader'"
        )


def _training_conflicts(config: Config) -> Iterator[str]:
    train = config.train
    if train.dropout and config.student.engine != "transformers":
        yield (
            f"train.dropout and student.engine = {config.student.engine!r} exclude each other: the engine's log-probs "
            "are compared with the trainer's, which would be those of another network each time; set train.dropout = "
            "false, or student.engine = 'transformers'"
        )
    if train.region_gradients and config.runtime.compile:
        yield (
            "train.region_gradients and runtime.compile exclude each other: a compiled backward pass can run "
            "only once; set train.region_gradients = false, or runtime.compile = false"
        )
    if train.attention not in ("auto", "varlen"):
        for name, value, wanted in (
            ("student.dtype", config.student.dtype, "bfloat16"),
            ("runtime.device", config.runtime.device, "cuda"),
        ):
            if value not in ("auto", wanted):
                yield (
                    f"train.attention = {train.attention!r} excludes {name} = {value!r}: set {name} = {wanted!r}, or "
                    "train.attention = 'auto'"
                )


def _follow_conflicts(config: Config) -> Iterator[str]:
    """A teacher that follows the student is a copy of it, beside it in one process, and waits for its updates."""
    teacher, student = config.teacher, config.student
    if teacher.follow is None:
        return
    for name, wrong, remedy in (
        ("teacher.model", teacher.model != student.model, "set teacher.model = 'student'"),
        ("teacher.url", bool(teacher.urls), "leave teacher.url out"),
        ("teacher.by_domain", bool(teacher.by_domain), "leave teacher.by_domain out"),
        ("teacher.engine", teacher.scorer != "transformers", "set teacher.scoring_engine = 'transformers'"),
        (
            "teacher.dtype",
            teacher.dtype == "bfloat16",
            "set teacher.dtype = 'float32': small changes round to none",
        ),
        ("student.lora", student.lora is not None, "leave student.lora out"),
        ("train.max_staleness", config.train.max_staleness > 0, "set train.max_staleness = 0"),
        ("objective.rollouts", config.objective.rollouts != "student", "set objective.rollouts = 'student'"),
    ):
        if wrong:
            yield f"teacher.follow does not go with {name} as it is: {remedy}, or leave teacher.follow out"


def _extrapolation_conflicts(config: Config) -> Iterator[str]:
    objective = config.objective
    settings = objective.extrapolation
    if settings is None:
        return
    if config.train.max_staleness:
        yield (
            "objective.extrapolation and train.max_staleness exclude each other: the next step's responses would be of "
            "weights from before the extrapolation, more than an update away; set train.max_staleness = 0, or leave "
            "objective.extrapolation out"
        )
    if settings.problems not in config.evaluation_sets:
        names = ", ".join(repr(name) for name in config.evaluation_sets if name) or "there is none"
        yield (
            f"objective.extrapolation.problems = {settings.problems!r} is none of evaluation.benchmarks ({names}): set "
            "the name of one, or leave objective.extrapolation.problems out"
        )
    elif settings.score == "accuracy" and any(
        one.name == settings.problems and one.lighteval is not None for one in config.benchmarks
    ):
        yield (
            f"objective.extrapolation.problems = {settings.problems!r} is judged by lighteval, not while training: set "
            "the name of another benchmark, or objective.extrapolation.score = 'reverse_kl'"
        )
    elif settings.score == "accuracy" and not config.problem_files[settings.problems].answer_field:
        yield (
            "objective.extrapolation.score = 'accuracy' needs answers, and data.answer_field is empty: set "
            "data.answer_field, or objective.extrapolation.score = 'reverse_kl'"
        )
    if settings.score == "reverse_kl" and not (
        objective.rollouts == "student" and teacher_needs(objective).token_logprobs
    ):
        yield (
            f"objective.extrapolation.score = 'reverse_kl' asks the teacher of a training that asks it, and objective "
            f"{objective.name!r} does not: set objective.extrapolation.score = 'accuracy'"
        )


def _evaluation_conflicts(config: Config) -> Iterator[str]:
    names = [b.name for b in config.evaluation.benchmarks] + [t.name for t in config.evaluation.harness]
    if len(set(names)) < len(names):
        yield (
            f"evaluation.benchmarks, evaluation.harness: names are not unique ({', '.join(names)}); set one of them to "
            "another name"
        )
    if "eval" in names:
        yield (
            "evaluation.benchmarks, evaluation.harness: 'eval' is how results name the problems of [evaluation] itself; "
            "set another name"
        )
    for one in config.evaluation.benchmarks:
        own = ("grader", "id_field", "prompt_field", "answer_field", "template")
        wrong = [field for field in own if getattr(one, field) is not None]
        if one.lighteval is not None and wrong:
            yield (
                f"evaluation.benchmarks, {one.name!r}: lighteval writes its questions and judges it, so "
                f"{', '.join(wrong)} would have no effect: leave that out, or leave lighteval out"
            )
    for name, part in config.evaluation_sets.items():
        owner = f"evaluation.benchmarks, {name!r}" if name else "evaluation.pass_at"
        if (most := max(part.pass_at, default=0)) > part.samples:
            yield (
                f"{owner}: pass@{most} needs samples = {most}, there are {part.samples} (evaluation.samples, or those of "
                "the benchmark): raise samples, or lower pass_at"
            )
        if name and not config.problem_files[name].answer_field:
            yield (
                f"{owner} has no expected answers, since data.answer_field is empty: set data.answer_field, or "
                "that of the benchmark"
            )
    if not config.data.answer_field and not config.evaluation.distance_prompts:
        yield (
            "evaluation.distance_prompts = 0 and an empty data.answer_field leave nothing to evaluate: set "
            "data.answer_field, or leave evaluation.distance_prompts out"
        )


def _problem_conflicts(config: Config) -> Iterator[str]:
    data, demo = config.data, config.demo
    if data.system is not None and not data.chat:
        yield "data.system is a message for the chat template, and data.chat is false: set data.chat = true"
    if any(context.system is not None for context in config.teacher.contexts) and not data.chat:
        yield "teacher.context.system is a message for the chat template, and data.chat is false: set data.chat = true"
    for role in ("student", "teacher"):
        for field in ("chat_template_args", "chat_template_file"):
            if getattr(getattr(config, role), field) and not data.chat:
                yield (
                    f"{role}.{field} is for the chat template, and data.chat is false: set data.chat = true, or leave "
                    f"{role}.{field} out"
                )
    if config.prefixes.keep == "correct" and not data.answer_field:
        yield (
            "prefixes.keep = 'correct' needs answers, and data.answer_field is empty: set data.answer_field, or "
            "prefixes.keep = 'all'"
        )
    for column, field in (("answer", "answer_field"), ("domain", "domain_field")):
        if not getattr(data, field) and any(getattr(source, column) for source in data.sources):
            yield (
                f"data.sources names {column}, and data.{field}, the field that it is written to, is empty: "
                f"set data.{field}"
            )
    if not demo.enabled:
        return
    if demo.models == "smollm2" and not data.chat:
        yield "demo.models = 'smollm2' has conversations as prompts, which need a chat template: set data.chat = true"
    if data.prompt_field != "prompt" or data.answer_field not in ("answer", ""):
        yield (
            "demo.enabled = true writes problems with the fields prompt and answer: leave data.prompt_field and "
            "data.answer_field out"
        )
