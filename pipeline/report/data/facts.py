"""Content of a report, as data: the page is drawn from this, and ``tropd report --json`` prints it.

A number that is not known is null, never zero. No clock is in here: equal workspaces on one machine
give equal reports.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tropd.pipeline.report.status import StageState
from tropd.pipeline.report.verdicts.verdict_rules import Level
from tropd.storage.formats.samples_file import StepSample
from tropd.storage.workspace import Mode, Who


class ReportPart(BaseModel):
    """Base of all parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class StageReport(ReportPart):
    """One stage."""

    command: str
    state: StageState
    done: int | None
    total: int | None
    unit: str
    rows: int
    bytes: int
    seconds: float | None
    fingerprint: str | None
    summary: dict[str, Any] = {}


class Example(ReportPart):
    """One response, shortened, as evidence."""

    prompt: str | None
    response: str
    answer: str | None
    expected: str


class Answers(ReportPart):
    """Answers that the grader found in one model's responses in one mode."""

    unanswered: float | None
    """Share of the responses that were not cut off in which it found none; null if all were cut off."""
    commonest: str | None
    """The answer that is given most often."""
    commonest_fraction: float
    """Its share of the responses."""
    expected_fraction: float
    """Share of the commonest expected answer, for comparison."""
    examples: list[Example]
    """The first few responses without an answer; without such, the first wrong ones."""


class Accuracy(ReportPart):
    """Share of right answers, and its 95 % interval (see ``Evaluation.interval_method``)."""

    accuracy: float
    low: float
    high: float
    problems: int
    samples: int
    """Responses over all problems."""
    mean_tokens: float | None = None
    truncated_fraction: float | None = None
    """Share of responses that reached the length limit."""
    answers: Answers | None = None


class Measure(ReportPart):
    """A mean over tokens, or responses, and its 95 % interval over prompts."""

    mean: float
    interval: tuple[float, float] | None
    """None with fewer than three prompts."""


class Distance(ReportPart):
    """Distance of a model to the teacher on held-out prompts; nats and shares per token. A teacher's own has no KL."""

    reverse_kl: Measure | None
    forward_kl: Measure | None
    acceptance: Measure | None
    length: Measure | None
    """Tokens of a response."""
    truncated: Measure | None
    """Share of responses that reached the length limit."""
    entropy: Measure | None
    prompts: int
    method: Literal["exact", "topk"]
    """Sums over all tokens, or from sampled tokens and the teacher's most likely."""


class Contender(ReportPart):
    """Results of one model: the student before or after training, or the teacher."""

    greedy: Accuracy | None = None
    sampled: Accuracy | None = None
    distance: Distance | None = None


class Gain(ReportPart):
    """After minus before on the problems that both answered, with a 95 % interval of the paired difference."""

    difference: float
    low: float
    high: float
    problems: int
    became_right: int
    """Problems on which more responses are right after than before."""
    became_wrong: int


class Gains(ReportPart):
    greedy: Gain | None = None
    sampled: Gain | None = None


class Evaluation(ReportPart):
    before: Contender | None = None
    after: Contender | None = None
    teacher: Contender | None = None
    gain: Gains = Gains()
    reverse_kl_change: Measure | None = None
    """The student's reverse KL to the teacher after minus before training, on the prompts that both answered."""
    interval_method: str = (
        "accuracy: Wilson score interval at the effective sample size of responses clustered by problem; "
        "gain: normal interval of the paired per-problem difference; "
        "distance: studentized bootstrap over prompts, for its change over pairs of both responses"
    )

    @property
    def graded(self) -> bool:
        """True if any accuracy exists: problems need no answers."""
        contenders = [one for one in (self.before, self.after, self.teacher) if one is not None]
        return any(one.greedy or one.sampled for one in contenders)

    @property
    def compared(self) -> bool:
        """True if any distance exists."""
        return any(one is not None and one.distance for one in (self.before, self.after, self.teacher))

    def distance(self, who: Who) -> Distance | None:
        contender: Contender | None = getattr(self, who)
        return contender.distance if contender else None

    def accuracy(self, who: Who, mode: Mode) -> Accuracy | None:
        contender: Contender | None = getattr(self, who)
        found: Accuracy | None = getattr(contender, mode) if contender else None
        return found


class RegionFraction(ReportPart):
    """Share of supervised tokens per region, over the whole run."""

    trust: float | None = None
    outlier: float | None = None
    guidance: float | None = None


class TrainingPhase(ReportPart):
    """A phase of all steps; phases of a run that prepares the next step while one trains overlap."""

    name: str
    seconds: float
    tokens_per_second: float | None
    peak_bytes: float | None
    """Most memory in it, of the process that needs the most: of its GPU, or on a CPU resident."""
    mfu: float | None
    """Operations that training needs, as a share of the GPUs' peak."""


class Training(ReportPart):
    """Sums over the run, and the recorded curves."""

    steps: int
    planned_steps: int | None
    tokens_on_policy: int | None = None
    tokens_guidance: int | None = None
    teacher_tokens_scored: int | None = None
    teacher_topk_tokens: int | None = None
    teacher_bytes_received: int | None = None
    teacher_bytes_sent: int | None = None
    region_fraction: RegionFraction = RegionFraction()
    seconds: dict[str, float] = {}
    """rollout, score, train, other: where the time of the stage went."""
    phases: list[TrainingPhase] = []
    idle_shares: list[float] = []
    """Of each of several processes the share of the steps' time in which it waited for the others, its GPU idle."""
    queue_seconds: float | None = None
    """Seconds that the requests waited in the teacher's queue, added up."""
    series: dict[str, list[float | None]] = {}
    """One column per metric, aligned with the column ``step``."""


class Cache(ReportPart):
    """The teacher's scores of its own trajectories."""

    tokens: int | None = None
    bytes_per_token: float | None = None
    alternatives_per_token: float | None = None
    kept_mass: float | None = None
    trajectories: int | None = None
    mean_length: float | None = None
    kept_fraction: float | None = None


class GradedAnswer(ReportPart):
    """One response to a problem."""

    text: str
    answer: str | None
    correct: bool


class BeforeAndAfter(ReportPart):
    """The same problem before and after training."""

    prompt_id: str
    mode: Mode
    prompt: str | None
    expected: str | None
    before: GradedAnswer
    after: GradedAnswer


class SampledStep(ReportPart):
    """The responses of one step that the acceptance map shows, added up."""

    step: int
    responses: int
    guidance_tokens: int
    """Shown tokens, as are the next."""
    student_tokens: int
    p_trust_mean: float | None
    outlier_fraction: float | None
    """Share of the student's tokens."""
    tokens_with_alternatives: int
    """Tokens for which the teacher was asked for alternatives."""


class RunSummary(ReportPart):
    """One of several runs side by side."""

    label: str
    """The workspace's folder, with as much of its path as distinguishes it from the others."""
    state: str
    """Progress, in words."""
    objective: str | None
    seed: int | None
    evaluation: Evaluation
    problems: str | None
    """Hash of the held-out problems that it was measured on."""
    steps: int | None
    tokens_on_policy: int | None
    teacher_tokens_scored: int | None
    teacher_bytes_received: int | None
    outlier_fraction: float | None
    seconds: float | None
    """Time of training."""
    series: dict[str, list[float | None]]
    """The metrics that are drawn for all runs, aligned with the column ``step``."""
    missing: list[str]


class Provenance(ReportPart):
    """Origins of this run. Versions and machine are those of the process that wrote the report."""

    versions: dict[str, str]
    platform: str
    cpu_count: int | None
    commit: str | None
    """Commit of the source tree that this tropd runs from; ``+changes`` if it was edited since."""
    fingerprints: dict[str, str]
    inputs: dict[str, str]
    """Hashes of models, tokenizers and files, as the stages recorded them."""


class Verdict(ReportPart):
    """A fault or a doubt, as a careful colleague would put it. A healthy run has none."""

    name: str
    """See ``verdict_rules.RULES``, and docs/troubleshooting.md."""
    level: Level
    """problem: the result is not what it seems, or the run fails; warning: to be looked at."""
    sentence: str
    evidence: list[str]
    """Numbers with their steps, or responses."""
    advice: str
    """Remedy, with settings by name in backticks."""

    @property
    def line(self) -> str:
        """Sentence and advice in one line."""
        return f"{self.sentence} {self.advice}"


class Report(ReportPart):
    """Everything that is known about a run."""

    workspace: str
    headline: str
    """The outcome in one sentence."""
    verdicts: list[Verdict]
    """Verdicts, problems first."""
    stages: dict[str, StageReport]
    evaluation: Evaluation
    training: Training | None
    cache: Cache
    samples: list[BeforeAndAfter]
    acceptance: list[SampledStep]
    acceptance_map: list[StepSample] = Field(default=[], exclude=True)
    """Every token of the sampled steps; in JSON it is the trainer's own file."""
    runs: list[RunSummary] = []
    """This run and those beside it, if there are any."""
    config: dict[str, Any] | None
    config_sources: dict[str, str]
    """Sources of the fields' values, of those that are not left at their default."""
    provenance: Provenance
    missing: list[str]
    """Parts that a finished, undamaged run has and this one lacks, in words."""
