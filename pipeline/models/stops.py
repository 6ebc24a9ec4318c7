"""The token ids at which a response ends, for student and teacher.

A teacher stops where it was made to: at the end-of-sequence token of its tokenizer and those of its
``generation_config.json``. The student is stopped at these too, besides its own. Where it is a base model and the teacher
a chat model, it has to learn to end as the teacher does, and its own end must not lead into text nobody reads. The
teacher scores tokens that end a response like any others, so that the student learns from them which of them to use.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import model_directory, model_is_here
from tropd.pipeline.models.loading import load_generation_config, load_tokenizer, stop_token_ids
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace


def stop_ids(workspace: Workspace, config: Config, role: str, folder: Path | None = None) -> frozenset[int]:
    """Token ids that end a response of ``teacher`` or ``student``: ``rollout.stop_ids``, or those of the model.

    To the student's belong those of every teacher that is on this machine.

    Args:
        folder: another directory than the role's own.

    Raises:
        ConfigError: one of ``rollout.stop_ids`` is not a token.
    """
    settings: ModelConfig = getattr(config, role)
    folder = folder or model_directory(workspace, settings, role)
    given = config.rollout.stop_ids
    if given is not None:
        tokens = num_tokens(load_tokenizer(folder, trust_remote_code=settings.trust_remote_code))
        if max(given) >= tokens:
            raise ConfigError(
                f"rollout.stop_ids names {max(given)}, which is not a token of {role}.model: its tokenizer has ids "
                f"0 … {tokens - 1}"
            )
        return frozenset(given)
    found = _own(folder, settings)
    if role == "student":
        for teacher in (config.teacher, *config.teacher.by_domain):
            if model_is_here(workspace, teacher):
                found |= _own(model_directory(workspace, teacher, "teacher"), teacher)
    return found


def _own(folder: Path, settings: ModelConfig) -> frozenset[int]:
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    return stop_token_ids(load_generation_config(folder), tokenizer)


def differing_stops(workspace: Workspace, config: Config, tokenizer: Any) -> str | None:
    """In words, where student and teacher end their responses at different tokens and no setting decides.

    Args:
        tokenizer: the student's; only texts are taken from it.
    """
    if config.rollout.stop_ids is not None:
        return None
    teacher = stop_ids(workspace, config, "teacher")
    student = _own(model_directory(workspace, config.student, "student"), config.student)
    if teacher == student:
        return None
    both = sorted(teacher | student)
    return (
        f"the teacher ends a response with {_named(teacher, tokenizer)}, the student with {_named(student, tokenizer)} "
        "(tokenizer_config.json and generation_config.json of the models). The student is stopped at all of them, and "
        f"train/final says so; to choose otherwise, set rollout.stop_ids, now {both}"
    )


def _named(ids: Collection[int], tokenizer: Any) -> str:
    texts = tokenizer.convert_ids_to_tokens(sorted(ids))
    return ", ".join(f"{text!r} ({number})" for text, number in zip(texts, sorted(ids), strict=True))
