"""The acceptance map: sampled responses with every token colored by how far the teacher accepts it.

The facts of a token are the text of its ``title``: readable as it is without scripts, and made into a box by
``page.js``. A line is a heading, or a name and a value with a tab between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from tropd.pipeline.report.data.facts import SampledStep
from tropd.storage.formats.samples_file import SampledResponse, StepSample, StudentToken

_SHOWN_AS = str.maketrans({"\n": "↵\n", "\r": "␍", "\t": "⇥\t"})
_NAMED_AS = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})
# Part of a character: the token after it has the whole.
_NO_TEXT = "◌"


@dataclass(frozen=True)
class ShownToken:
    text: str
    after: str
    """The line break at its end, which has no color."""
    kind: str
    """CSS class: ``guidance``, ``trust`` or ``outlier``."""
    percent: float | None
    """P_trust in percent; None for guidance, which the student has not written."""
    title: str


@dataclass(frozen=True)
class ShownResponse:
    prompt: str
    prompt_id: str
    summary: str
    tokens: Sequence[ShownToken]


@dataclass(frozen=True)
class ShownStep:
    step: int
    summary: str
    responses: Sequence[ShownResponse]


def summarize_samples(samples: Sequence[StepSample]) -> list[SampledStep]:
    """Each sampled step's numbers."""
    return [_summarize(sample) for sample in samples]


def _summarize(sample: StepSample) -> SampledStep:
    tokens = [token for response in sample.responses for token in response.tokens]
    known = [token.p_trust for token in tokens if token.p_trust is not None]
    return SampledStep(
        step=sample.step,
        responses=len(sample.responses),
        guidance_tokens=sum(len(response.guidance) for response in sample.responses),
        student_tokens=len(tokens),
        p_trust_mean=sum(known) / len(known) if known else None,
        outlier_fraction=sum(t.outlier for t in tokens) / len(tokens) if tokens else None,
        tokens_with_alternatives=sum(bool(t.alternatives) for t in tokens),
    )


def show_samples(samples: Sequence[StepSample]) -> list[ShownStep]:
    """The sampled steps as the page shows them."""
    return [
        ShownStep(sample.step, _step_text(_summarize(sample)), [_response(r) for r in sample.responses])
        for sample in samples
    ]


def _step_text(found: SampledStep) -> str:
    if found.outlier_fraction is None:
        return "the student has written nothing in this step"
    if found.p_trust_mean is None:
        return f"{found.student_tokens:,} of the student’s tokens; the teacher was not asked"
    return (
        f"{found.student_tokens:,} of the student’s tokens: mean P_trust {_percent(found.p_trust_mean)}, "
        f"{_percent(found.outlier_fraction)} outliers"
    )


def _response(response: SampledResponse) -> ShownResponse:
    guidance = [ShownToken(*_shown(text), "guidance", None, _guidance(text)) for text in response.guidance]
    return ShownResponse(
        prompt=response.prompt,
        prompt_id=response.prompt_id,
        summary=_response_text(response),
        tokens=[*guidance, *(_token(token) for token in response.tokens)],
    )


def _response_text(response: SampledResponse) -> str:
    parts = []
    if response.guidance_tokens:
        parts.append(f"{response.guidance_tokens:,} tokens from the teacher")
        if len(response.guidance) < response.guidance_tokens:
            parts[-1] += f" (the last {len(response.guidance):,} shown)"
    parts.append(f"{response.student_tokens:,} from the student")
    if len(response.tokens) < response.student_tokens:
        parts[-1] += f" (the first {len(response.tokens):,} shown)"
    if response.truncated:
        parts.append("stopped by the length limit")
    if response.reward is not None:
        parts.append(f"reward {response.reward:.3g}")
    return ", ".join(parts)


def _token(token: StudentToken) -> ShownToken:
    lines = [_named(token.text), f"region\t{_region(token)}"]
    student = f"student\t{_percent(exp(min(token.student_logprob, 0.0)))}"
    if token.p_trust is None:
        lines.append(student)
    else:
        teacher = 0.0 if token.teacher_logprob is None else exp(min(token.teacher_logprob, 0.0))
        lines += [f"P_trust\t{_percent(token.p_trust)}", student, f"teacher\t{_percent(teacher)}"]
    if token.alternatives:
        lines.append("The teacher’s most likely")
        lines += [f"{_named(a.text)}\t{_percent(a.probability)}" for a in token.alternatives]
    kind = "outlier" if token.outlier > 0.5 else "trust"
    percent = None if token.p_trust is None else round(100 * token.p_trust, 1)
    return ShownToken(*_shown(token.text), kind, percent, "\n".join(lines))


def _guidance(text: str) -> str:
    return f"{_named(text)}\nregion\tguidance: written by the teacher"


def _region(token: StudentToken) -> str:
    if token.trust > 0 and token.outlier > 0:
        return f"trust region {token.trust:.2g}, outlier {token.outlier:.2g}"
    if token.outlier > 0:
        return "outlier"
    return "trust region" if token.trust > 0 else "none"


def _shown(text: str) -> tuple[str, str]:
    """The text as it is shown, and the line break at its end."""
    shown = text.translate(_SHOWN_AS) or _NO_TEXT
    inside = shown.removesuffix("\n")
    return inside, shown[len(inside) :]


def _named(text: str) -> str:
    return f"“{text.translate(_NAMED_AS)}”" if text else f"{_NO_TEXT} part of a character"


def _percent(share: float) -> str:
    """Three digits, also of small probabilities."""
    if 0 < share < 1e-6:
        return "< 0.0001\u00a0%"
    percent = 100 * share
    digits = 1 if percent >= 10 else 2 if percent >= 1 else 3 if percent >= 0.01 or not percent else 4
    text = f"{percent:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')}\u00a0%"
