"""Several teachers: a domain of prompts may have its own, ``[[teacher.by_domain]]``; others have ``[teacher]``.

All other code knows runs with one teacher; ``with_only`` makes such a run of each of several.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from tropd.pipeline.config.sections.model_settings import TeacherConfig
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.problems.prompts import Prompt, scan_prompts
from tropd.pipeline.run.opening import open_engine
from tropd.pipeline.run.run import Run, as_scorer
from tropd.storage.errors import ConfigError
from tropd.storage.stage.fingerprint import Scalar

Item = TypeVar("Item")

GENERAL = ""
"""Name of ``[teacher]`` itself; the others have the name of their domain."""


def teacher_of(run: Run, domain: str) -> str:
    """Name of the teacher of a domain's prompts."""
    return domain if domain in {own.domain for own in run.config.teacher.by_domain} else GENERAL


def teachers_in_use(run: Run) -> list[str]:
    """Names of the teachers that some training prompt has, in a fixed order.

    Raises:
        DataError: the prompt file is missing.
        ConfigError: a domain's teacher has no prompt.
    """
    by_domain = run.config.teacher.by_domain
    if not by_domain:
        return [GENERAL]
    used = set(prompt_teachers(run).values())
    for own in by_domain:
        if own.domain not in used:
            raise ConfigError(
                f"teacher.by_domain names domain {own.domain!r}, which no training prompt has",
                hint=f"prompts say their domain in the field {run.config.data.domain_field!r} (data.domain_field)",
            )
    return [name for name in (GENERAL, *(own.domain for own in by_domain)) if name in used]


def prompt_teachers(run: Run) -> Mapping[str, str]:
    """Name of the teacher of every training prompt, by the prompt's id."""
    prompts, _ = scan_prompts(run.workspace.resolve(run.config.data.prompts), run.config.data)
    return {prompt.id: teacher_of(run, prompt.domain) for prompt in prompts}


def with_only(run: Run, name: str) -> Run:
    """The run with this teacher only.

    Raises:
        ConfigError: no teacher has that name.
    """
    teacher = run.config.teacher
    found = [own for own in teacher.by_domain if own.domain == name] if name else [teacher]
    if not found:
        names = ", ".join(own.domain for own in teacher.by_domain) or "none"
        raise ConfigError(
            f"no teacher of domain {name!r}", hint=f"domains with a teacher of their own: {names}"
        )
    known = type(found[0]).model_fields.keys() & TeacherConfig.model_fields.keys() - {"by_domain"}
    fields = {field: getattr(found[0], field) for field in known}
    config = run.config.model_copy(update={"teacher": TeacherConfig(**fields)})
    return replace(run, resolved=replace(run.resolved, config=config))


class EngineSlot:
    """Holds at most one loaded engine; opening another frees the first."""

    def __init__(self, run: Run, role: str, *, batch_size: int = 1, batch_tokens: int = 16384) -> None:
        self._run, self._role = run, role
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._which: tuple[str, str] | None = None
        self._opened: tuple[Engine, Any] | None = None

    def open(self, name: str, *, to_score: bool = False) -> tuple[Engine, Any]:
        """The engine of the teacher with that name (of the student, whose only name is the general one) and its
        tokenizer; ``to_score``: the engine that scores, which may be another than the one that writes."""
        run = with_only(self._run, name) if name else self._run
        run = as_scorer(run) if to_score else run
        which = (name, getattr(run.config, self._role).engine)
        if self._opened is None or self._which != which:
            self._opened = None  # its memory is free before the next one is loaded
            self._opened = open_engine(
                run, self._role, batch_size=self._batch_size, batch_tokens=self._batch_tokens
            )
            self._which = which
        return self._opened

    def close(self) -> None:
        """Free its memory, also for other processes."""
        self._opened = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def batched(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive parts of at most ``size``."""
    return [items[low : low + size] for low in range(0, len(items), size)]


def fields_of_all(
    run: Run, names: Sequence[str], fields_of: Callable[[Run], Mapping[str, Scalar]]
) -> dict[str, Scalar]:
    """Fingerprint fields of several teachers: those of a domain's are called ``teacher.DOMAIN.…``."""
    fields: dict[str, Scalar] = {}
    for name in names:
        for field, value in fields_of(with_only(run, name)).items():
            fields[field.replace("teacher.", f"teacher.{name}.", 1) if name else field] = value
    return fields


def grouped(run: Run, prompts: Sequence[Prompt]) -> list[tuple[str, list[int]]]:
    """Indices of the prompts by teacher, each in the order of the file."""
    groups: dict[str, list[int]] = {name: [] for name in teachers_in_use(run)}
    for index, prompt in enumerate(prompts):
        groups[teacher_of(run, prompt.domain)].append(index)
    return [(name, indices) for name, indices in groups.items() if indices]
