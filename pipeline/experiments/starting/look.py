"""A look at two models and a file of prompts, on which a configuration depends. Of weights, only headers are read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.experiments.starting.fields import Fields, find_fields, sample_records
from tropd.pipeline.models.directories import described_directory, model_is_here
from tropd.pipeline.models.loading import check_model, context_length, load_model_config, load_tokenizer
from tropd.pipeline.models.tokenizers import chat_template, check_tokenizers
from tropd.pipeline.problems.encoding import encode_prompts, tokens_of
from tropd.pipeline.problems.prompts import Prompt, refuse, scan_prompts
from tropd.pipeline.problems.same_prompts import check_same_prompts
from tropd.pipeline.training.memory_plan import LOOKED_AT, ModelShape
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace


@dataclass(frozen=True)
class Models:
    """The pair."""

    teacher: ModelShape
    student: ModelShape
    tokenizer: Any
    """The student's."""
    teacher_tokenizer: Any
    context: int
    """Longest sequence that both take, in tokens."""
    here: bool
    """True if the weights of both are on this machine."""
    chat: bool
    """True if their tokenizer has a chat template."""


@dataclass(frozen=True)
class Data:
    """Prompts of a file."""

    path: Path
    fields: Fields
    prompts: Sequence[Prompt]
    records: Sequence[Mapping[str, Any]]
    """The first ones, as they are in the file."""
    left_out: int = 0
    """Records that cannot be used, with ``data.skip_bad``."""


@dataclass(frozen=True)
class Lengths:
    """Prompts as token ids."""

    encoded: Sequence[Sequence[int]]
    date: datetime.date | None
    """The date given to the chat template, if it uses one."""

    @property
    def longest(self) -> int:
        return max(map(len, self.encoded))

    @property
    def mean(self) -> float:
        return sum(map(len, self.encoded)) / len(self.encoded)


def look_at_models(workspace: Workspace, teacher: str, student: str, chat: bool | None) -> Models:
    """Configurations and tokenizers of the pair; of models on the hub that are not here, only these are fetched.

    Args:
        chat: write prompts with the chat template; if not given, where one exists.

    Raises:
        ConfigError, DataError: one is not there, cannot be read or is not whole, or their tokenizers differ.
    """
    names = {"teacher": teacher, "student": student}
    settings = {role: ModelConfig(model=model) for role, model in names.items()}
    folders = {role: described_directory(workspace, own, role) for role, own in settings.items()}
    tokenizers = {role: load_tokenizer(folder) for role, folder in folders.items()}
    configs = {role: load_model_config(folder) for role, folder in folders.items()}
    wanted = chat_template(tokenizers["teacher"]) is not None if chat is None else chat
    check_tokenizers(tokenizers["student"], tokenizers["teacher"])
    here = [role for role, own in settings.items() if model_is_here(workspace, own)]
    for role in here:
        check_model(folders[role], tokenizers[role])
    return Models(
        teacher=ModelShape.of(configs["teacher"]),
        student=ModelShape.of(configs["student"]),
        tokenizer=tokenizers["student"],
        teacher_tokenizer=tokenizers["teacher"],
        context=min(context_length(config) for config in configs.values()),
        here=len(here) == len(names),
        chat=wanted,
    )


def look_at_data(
    path: Path,
    chat: bool,
    template: str,
    prompt_field: str | None,
    answer_field: str | None,
    *,
    skip_bad: bool = False,
) -> Data:
    """The usable prompts of a file.

    Args:
        skip_bad: leave out records that cannot be used, instead of refusing the file.

    Raises:
        ConfigError, DataError: the file, its fields or some records cannot be used.
    """
    records = sample_records(path)
    fields = find_fields(path, records, prompt_field, answer_field)
    if fields.messages and not chat:
        raise ConfigError(
            f"{path}: {fields.prompt!r} holds lists of messages, which only a chat template can write, and the models' "
            "tokenizer has none",
            hint="take models with a chat template, or name a field with texts with --prompt-field",
        )
    data = DataConfig(
        prompt_field=fields.prompt, answer_field=fields.answer or "", chat=chat, template=template
    )
    prompts, rejects = scan_prompts(path, data)
    if not (skip_bad and prompts):
        refuse(path, rejects)
    return Data(path, fields, prompts, records, len(rejects))


def count_tokens(data: Data, models: Models, *, skip_bad: bool = False) -> Lengths:
    """The first prompts as the models read them.

    Args:
        skip_bad: pass over prompts that are too long, or that the template does not take.

    Raises:
        DataError: the tokenizer or its chat template does not take some, or they leave no room for a response.
        ConfigError: the two models read them differently.
    """
    found = encode_prompts(
        data.prompts[:LOOKED_AT], models.tokenizer, chat=models.chat, max_length=models.context - 1
    )
    if not (skip_bad and found.prompts):
        refuse(data.path, found.rejects)
    if models.chat:
        check_same_prompts(found.prompts, models.tokenizer, models.teacher_tokenizer)
    return Lengths(tokens_of(found.prompts), found.date)


def free_memory(device: str) -> float:
    """Bytes that are free on a device."""
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)
