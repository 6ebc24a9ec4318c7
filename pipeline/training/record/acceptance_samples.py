"""A few responses of a few steps, token by token, for people to look at: the report's acceptance map.

The file holds one record per sampled step and is small (at most 8 records of 4 responses), so it is
written anew and atomically each time. Reading it needs neither PyTorch nor a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tropd.pipeline.objectives.partition import acceptance
from tropd.storage.formats.step_log import sampled_steps, spread_steps
from tropd.storage.workspace import SAMPLES

if TYPE_CHECKING:
    from tropd.pipeline.problems.encoding import EncodedPrompt
    from tropd.pipeline.training.update.gradients import StepInputs
    from tropd.pipeline.training.update.micro_batches import RaggedTopk
from tropd.storage.formats.samples_file import (
    Alternative,
    SampledResponse,
    StepSample,
    StudentToken,
    _write,
    read_samples,
)

ROWS = 4
MAX_TOKENS = 400
"""Of the student's tokens in a response, this many from the first one are kept."""
MAX_GUIDANCE = 100
"""Of the teacher's prefix, this many up to the last one are kept: those that the student continues from."""
MAX_PROMPT = 1000
ALTERNATIVES = 5
_DIGITS = 5


def write_sample(
    folder: Path,
    step: int,
    total_steps: int,
    inputs: StepInputs,
    prompts: Sequence[EncodedPrompt],
    tokenizer: Any,
) -> None:
    """Add a step's responses to the file, if the step is one of those that are kept."""
    if step not in sampled_steps(total_steps):
        return
    sample = take_sample(step, inputs, prompts, tokenizer)
    before = [earlier for earlier in read_samples(folder / SAMPLES)[0] if earlier.step < step]
    _write(folder, [*before, sample])


def take_sample(
    step: int, inputs: StepInputs, prompts: Sequence[EncodedPrompt], tokenizer: Any
) -> StepSample:
    """Some rows of a step: evenly from all in which the student wrote something."""
    rows = inputs.rows
    written = [index for index, row in enumerate(rows) if row.tokens] or list(range(len(rows)))
    first = np.cumsum([0, *(len(row.tokens) for row in rows)])
    return StepSample(
        step=step,
        responses=[
            _response(inputs, index, int(first[index]), prompts, tokenizer)
            for index in (written[place] for place in spread_steps(len(written), ROWS))
        ],
    )


def _response(
    inputs: StepInputs, index: int, first: int, prompts: Sequence[EncodedPrompt], tokenizer: Any
) -> SampledResponse:
    row = inputs.rows[index]
    prompt = prompts[row.plan.prompt_index]
    guidance = list(row.plan.prefix_tokens)[-MAX_GUIDANCE:]
    tokens = list(row.tokens)[:MAX_TOKENS]
    texts = token_texts(tokenizer, [*guidance, *tokens])
    span = slice(first, first + len(tokens))
    student = row.sampler_array[: len(tokens)].astype(np.float32)
    teacher = inputs.teacher.teacher_logprobs[span]
    probability = acceptance(student, teacher)
    alternatives = _alternatives(inputs.teacher.topk, first, len(tokens), tokenizer)
    return SampledResponse(
        prompt_id=prompt.id,
        prompt=prompt.prompt.text[:MAX_PROMPT],
        guidance=texts[: len(guidance)],
        guidance_tokens=len(row.plan.prefix_tokens),
        tokens=[
            StudentToken(
                text=text,
                trust=_short(inputs.regions.trust[first + place]),
                outlier=_short(inputs.regions.outlier[first + place]),
                student_logprob=_short(student[place]),
                teacher_logprob=_short(teacher[place]) if np.isfinite(teacher[place]) else None,
                p_trust=None if np.isnan(probability[place]) else _short(probability[place]),
                alternatives=alternatives.get(place, []),
            )
            for place, text in enumerate(texts[len(guidance) :])
        ],
        student_tokens=len(row.tokens),
        truncated=row.truncated,
        reward=row.reward,
    )


def _alternatives(topk: RaggedTopk, first: int, count: int, tokenizer: Any) -> dict[int, list[Alternative]]:
    """The teacher's likeliest alternatives of ``count`` tokens from ``first`` on, by place, where it gave any."""
    chosen = topk.select(np.arange(first, first + count))
    starts = np.cumsum(chosen.counts) - chosen.counts
    found: dict[int, list[Alternative]] = {}
    for place, start, size in zip(chosen.index, starts, chosen.counts, strict=True):
        logprobs = chosen.logprobs[start : start + size]
        likeliest = np.argsort(-logprobs, kind="stable")[:ALTERNATIVES]
        found[int(place)] = [
            Alternative(
                text=_decode(tokenizer, [int(chosen.ids[start + i])]),
                probability=_short(np.exp(np.float64(logprobs[i]))),
            )
            for i in likeliest
        ]
    return found


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """One text per token, which join to the text of all.

    A character may take several tokens: the last one has it, those before have nothing.
    """
    decode = partial(_decode, tokenizer)
    texts: list[str] = []
    start, done = 0, 0  # tokens before ``done`` have their text; those from ``start`` on are context
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[start:end])
        if text.endswith("\ufffd") and end < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(decode(tokens[start:done])) :])
        start, done = done, end
    return texts


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    if not tokens:
        return ""
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _short(value: Any) -> float:
    return round(float(value), _DIGITS)
