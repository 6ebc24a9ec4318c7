"""Held-out prompts on which student and teacher are compared, and the responses of both to them.

A response is drawn from its model's own distribution, with a seed of the run, the prompt and nothing else: also where
problems are answered by sampling at temperature 1, these are their first answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tropd.pipeline.models.engines.base import Generation, Sampler, Sampling
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.problems.encoding import Encoded, EncodedPrompt
from tropd.pipeline.run.opening import role_room
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import evenly
from tropd.pipeline.stages.prefixes import to_trajectory
from tropd.pipeline.teacher.by_domain import teacher_of, teachers_in_use, with_only
from tropd.pipeline.teacher.connect import local_teacher, teacher_fields
from tropd.pipeline.teacher.reading import as_teachers_read, context_fields
from tropd.storage.catalog import RESPONSES
from tropd.storage.formats.trajectories import Author, Trajectory
from tropd.storage.seeds import derive_seed
from tropd.storage.stage.fingerprint import Scalar

NUM_PROMPTS = "evaluation.distance_prompts"
TEACHER = "evaluation.distance_teacher"
PLAIN = Sampling()


@dataclass(frozen=True)
class HeldOut:
    """Prompts as the student reads them, each with the name of its teacher (see ``by_domain``)."""

    prompts: list[EncodedPrompt]
    teachers: list[str]

    def of(self, teacher: str) -> HeldOut:
        """Those of one teacher."""
        return self.at([i for i, name in enumerate(self.teachers) if name == teacher])

    def at(self, indices: Sequence[int]) -> HeldOut:
        """Some of them."""
        return HeldOut([self.prompts[i] for i in indices], [self.teachers[i] for i in indices])


def held_out_prompts(run: Run, problems: Encoded, wanted: int | None = None) -> HeldOut:
    """The prompts to compare on: those of the problems that a teacher of the run can read.

    Args:
        wanted: of them, spread over all; ``evaluation.distance_prompts`` if not given.

    Raises:
        ConfigError: a domain's teacher has no training prompt, or reads a prompt in another way than the student.
        DataError: a prompt is too long in its teacher's context.
    """
    names = teachers_in_use(run)
    response = run.config.evaluation_max_tokens
    room: dict[str, int | None] = {}
    for name in names:
        own = with_only(run, name)
        room[name] = None if local_teacher(own) is None else role_room(own, "teacher") - response
    usable = []
    for one in problems.prompts:
        name = teacher_of(run, one.prompt.domain)
        if name in room and ((most := room[name]) is None or len(one.tokens) <= most):
            usable.append((one, name))
    chosen = [usable[i] for i in evenly(len(usable), wanted or run.config.evaluation.distance_prompts)]
    told = as_teachers_read(
        run, replace(problems, prompts=[one for one, _ in chosen]), "evaluation", response
    )
    return HeldOut(told.prompts, [teacher_of(run, one.prompt.domain) for one in told.prompts])


def held_out_fields(run: Run, problems: Encoded | None) -> dict[str, Scalar]:
    """Fingerprint fields of the comparison: how many prompts, with which teachers, and what these are told.

    Args:
        problems: as students read them; None where none is compared.
    """
    wanted = run.config.evaluation.distance_prompts
    fields: dict[str, Scalar] = {NUM_PROMPTS: wanted}
    if wanted:
        text = json.dumps(dict(sorted(teacher_fields(run).items())))
        fields[TEACHER] = hashlib.sha256(text.encode()).hexdigest()
    if wanted and run.config.teacher.contexts and problems is not None:
        fields |= context_fields(run, held_out_prompts(run, problems).prompts)
    return fields


def tell_ungraded(run: Run, problems: Sequence[EncodedPrompt]) -> None:
    """Say how many evaluation problems have no answer, and so no grade."""
    without = sum(one.prompt.answer is None for one in problems)
    if not without:
        return
    where = run.config.data.evaluation
    name = run.config.data.answer_field
    field = f"(field {name!r})" if name else "(data.answer_field is empty)"
    if without == len(problems):
        run.reporter.info(
            f"{where}: no problem has an answer {field}: none is graded, so no accuracy is computed"
        )
    else:
        count = f"{without} of {len(problems)} problems have no answer"
        run.reporter.info(f"{where}: {count} {field}: these are not graded")


def responses_file(who: str) -> str:
    """Name of the file of a model's responses, in the stage's folder."""
    return f"{RESPONSES}{who}.parquet"


def sample_responses(
    run: Run, engine: Sampler, tokenizer: Any, held_out: HeldOut, author: Author
) -> list[Trajectory]:
    """One response to each prompt; a teacher writes in its own context, if it has one."""
    prompts = [one.scored_after if author == "teacher" else one.tokens for one in held_out.prompts]
    with within_memory(
        "responses to held-out prompts", "lower evaluation.batch_size or evaluation.max_tokens"
    ):
        generations = engine.generate(
            prompts,
            PLAIN,
            seeds=[derive_seed(run.config.run.seed, "eval", prompt.id, 0) for prompt in held_out.prompts],
            max_tokens=[run.config.evaluation_max_tokens] * len(held_out.prompts),
        )
    rows = zip(held_out.prompts, generations, strict=True)
    return [to_trajectory(prompt, 0, one, tokenizer, author) for prompt, one in rows]


def as_told(held_out: HeldOut, responses: Sequence[Trajectory]) -> list[Trajectory]:
    """Responses to some of the prompts, after these as their teachers read them."""
    known = {one.id: one for one in held_out.prompts}
    return [replace(one, prompt_tokens=known[one.prompt_id].scored_after) for one in responses]


def as_generation(response: Trajectory) -> Generation:
    """A stored response as an engine gives it."""
    return Generation(list(response.tokens), list(response.sampled_logprobs), response.finish_reason)


def sequences_of(responses: Sequence[Trajectory]) -> tuple[list[list[int]], list[int]]:
    """Prompt and response of each as one sequence, and where the response starts."""
    return (
        [[*response.prompt_tokens, *response.tokens] for response in responses],
        [len(response.prompt_tokens) for response in responses],
    )
