"""``samples.jsonl``: a few responses of a few training steps, token by token, for the report's acceptance map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.formats.step_log import log_line, read_log, resume_log, sampled_steps
from tropd.storage.workspace import SAMPLES


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Alternative(_Part):
    """A token that the teacher would have written, and its probability."""

    text: str
    probability: float


class StudentToken(_Part):
    """A token that the student wrote, and its region. Log-probs are natural, at temperature 1."""

    text: str
    trust: float
    """Weight with which it belongs to the trust region; ``outlier``: to the outliers."""
    outlier: float
    student_logprob: float
    """Log-prob as reported by the sampling engine."""
    teacher_logprob: float | None
    """None: minus infinity."""
    p_trust: float | None
    """min(π_T/π_S, 1); None: the teacher was not asked."""
    alternatives: list[Alternative] = []
    """The teacher's most likely tokens, where it was asked for them."""


class SampledResponse(_Part):
    """One row of a step. The texts of ``guidance`` and ``tokens`` join to the response, or to the part that is kept."""

    prompt_id: str
    prompt: str
    guidance: list[str]
    """Tokens of the teacher's prefix."""
    guidance_tokens: int
    """Number of the prefix's tokens, kept here or not."""
    tokens: list[StudentToken]
    student_tokens: int
    """Number of the student's tokens, kept here or not."""
    truncated: bool
    """The student ran into the length limit."""
    reward: float | None = None
    """Reward of the response, where the objective looks at rewards."""


class StepSample(_Part):
    """Kept responses of a step."""

    step: int
    responses: list[SampledResponse]


def resume_samples(folder: Path, first_step: int, total_steps: int) -> str:
    """Forget what a lost session wrote from ``first_step`` on; returns other losses in words (see ``step_log``)."""
    expected = [step for step in sampled_steps(total_steps) if step < first_step]
    if not expected and not (folder / SAMPLES).exists():
        return ""
    return resume_log(folder, SAMPLES, first_step, expected)[1]


def _write(folder: Path, samples: Sequence[StepSample]) -> None:
    write_text_atomic(folder / SAMPLES, "".join(log_line(s.model_dump(mode="json")) for s in samples))


def read_samples(path: Path) -> tuple[list[StepSample], int]:
    """The samples in step order, and how many lines are not readable as such."""
    found = read_log(path)
    samples, unreadable = [], len(found.damaged)
    for record in found.whole:
        try:
            samples.append(StepSample.model_validate(record))
        except ValidationError:
            unreadable += 1
    return samples, unreadable
