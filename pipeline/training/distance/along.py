"""Evaluation along the way, every ``train.evaluate_every`` steps: distance to the teacher, and accuracy.

The distance uses answers of the training's teacher: K1 and min(1, π_T/π_S) of the student's responses where a service
scores them, and the forward KL on the responses that the teacher has written before the first step, with their likeliest
tokens and the rest. Nothing here changes the training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.run.interrupt import StopRequestedError
from tropd.pipeline.stages.evaluation.distance import TokenDistances, sampled_distances, topk_distances
from tropd.pipeline.stages.evaluation.held_out import HeldOut, as_told, sample_responses
from tropd.pipeline.stages.evaluation.responses import Response, respond
from tropd.pipeline.stages.evaluation.teacher_answers import TeacherAnswer, ask_service
from tropd.pipeline.training.distance.held_out_set import TeacherResponse
from tropd.pipeline.training.session import Session
from tropd.storage.formats.step_log import StepRecord
from tropd.storage.formats.trajectories import Trajectory
from tropd.storage.workspace import Mode

_SMALLER = "lower scores.batch_tokens, or evaluation.distance_prompts"


def evaluate_student(session: Session) -> StepRecord:
    """Metrics of the current student. The engine must be idle."""
    if session.problems is None and session.held_out is None:
        return {}
    session.rolling.refresh()
    record: StepRecord = {}
    known: Mapping[str, Trajectory] = {}
    if session.held_out is not None and session.held_out.prompts.prompts:
        responses = write_held_out(session, session.held_out.prompts)
        known = {response.prompt_id: response for response in responses}
        record |= _of_student(session, session.held_out.prompts, responses)
        record |= _of_teacher(session, session.held_out.written)
    record |= _accuracy(session, known)
    session.rolling.rest()
    return record


def write_held_out(session: Session, held_out: HeldOut) -> list[Trajectory]:
    """One response of the student to each prompt. Its weights are those of the engine."""

    def write(share: list[int]) -> list[Trajectory]:
        prompts = held_out.at(share)
        return sample_responses(
            session.run, session.rolling.engine, session.student.tokenizer, prompts, "student"
        )

    return session.world.spread(range(len(held_out.prompts)), write)


def _of_student(session: Session, held_out: HeldOut, responses: Sequence[Trajectory]) -> StepRecord:
    """Length, and where services score, distances per token."""
    record: StepRecord = {
        "distance_prompts": len(responses),
        "distance_length": float(np.mean([len(response.tokens) for response in responses])),
    }
    if not (distances := reverse_distances(session, held_out, responses)):
        return record
    acceptance = np.concatenate([one.acceptance for one in distances if one.acceptance is not None])
    record["distance_reverse_kl"] = float(np.concatenate([one.kl for one in distances]).mean())
    record["distance_acceptance"] = float(acceptance.mean())
    return record


def reverse_distances(
    session: Session, held_out: HeldOut, responses: Sequence[Trajectory]
) -> list[TokenDistances] | None:
    """Distances of the student's responses to these prompts, where services score and something was written.

    None if a stop was requested while the teacher was away.
    """
    names = dict(zip((prompt.id for prompt in held_out.prompts), held_out.teachers, strict=True))
    # A student that a step has ruined is found before its checkpoint, not by the teacher.
    written = [
        response
        for response in responses
        if response.tokens
        and names[response.prompt_id] in session.scorers
        and np.isfinite(response.sampled_logprobs).all()
    ]
    # Copies count for themselves: requests of an evaluation are no traffic of a step.
    scorers = {name: copy.copy(scorer) for name, scorer in session.scorers.items()}

    def ask(share: list[Trajectory]) -> list[TeacherAnswer | None]:
        found: dict[str, TeacherAnswer] = {}
        try:
            for name, scorer in scorers.items():
                mine = [response for response in share if names[response.prompt_id] == name]
                answers = ask_service(scorer, as_told(held_out, mine), k=0, vocab_limit=session.vocab_limit)
                found |= {response.prompt_id: one for response, one in zip(mine, answers, strict=True)}
        except StopRequestedError:  # while the teacher is away; the step itself is done, and will be saved
            return [None] * len(share)
        return [found[response.prompt_id] for response in share]

    answers = session.world.spread(written, ask)
    if None in answers:
        return None
    return [
        sampled_distances(np.array(response.sampled_logprobs, dtype=np.float32), answer.logprobs)
        for response, answer in zip(written, answers, strict=True)
        if answer is not None
    ]


def _of_teacher(session: Session, written: Sequence[TeacherResponse]) -> StepRecord:
    """The teacher's length, and the forward KL per token, where it has written something."""
    if not written:
        return {}
    # The student itself, or a whole copy of a sharded one, as it samples; it is compiled already where it is to be.
    whole = session.rolling.whole_model is session.student.model
    loaded = replace(session.student, model=session.rolling.whole_model, compiles=False)
    batch_tokens = session.run.config.scores.batch_tokens
    student = loaded.engine(
        batch_size=1, batch_tokens=batch_tokens, autocast=session.precision if whole else None
    )

    def compare(share: list[TeacherResponse]) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
        sequences = [[*one.prompt_tokens, *one.tokens] for one in share]
        starts, alternatives = [len(one.prompt_tokens) for one in share], [one.alternatives for one in share]
        with within_memory("the distance to the teacher on held-out prompts", _SMALLER):
            found = topk_distances(student, sequences, starts, alternatives, batch_tokens=batch_tokens)
        return [one.kl for one in found]

    kls = session.world.spread(written, compare)
    return {
        "distance_forward_kl": float(np.concatenate(kls).mean()),
        "distance_teacher_length": float(np.mean([len(one.tokens) for one in written])),
    }


def _accuracy(session: Session, known: Mapping[str, Trajectory]) -> StepRecord:
    """Shares of right answers, and of how many problems."""
    if session.problems is None or not session.problems.prompts:
        return {}
    problems = session.problems.prompts
    record: StepRecord = {"accuracy_problems": len(problems)}
    modes: tuple[Mode, ...] = ("greedy", "sampled")

    def answer(share: list[int]) -> list[Response]:
        tokenizer = session.student.tokenizer
        own = [problems[i] for i in share]
        settings = session.run.config.evaluation
        return respond(session.run, settings, session.rolling.engine, tokenizer, own, mode, 1, known)

    for mode in modes:
        marks = session.world.spread(range(len(problems)), answer)
        record[f"accuracy_{mode}"] = sum(m.correct for m in marks) / len(marks)
    return record
