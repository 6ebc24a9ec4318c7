"""Checks of every row of a table, or method of a comparison, before the first of them runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace

from tropd.pipeline.config.schema import Config
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.run.run import Run
from tropd.pipeline.teacher.by_domain import GENERAL, with_only
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.training.preflight.checks import Check, check_training
from tropd.pipeline.training.preflight.machine import Machine
from tropd.pipeline.training.preflight.needs import Needs
from tropd.storage.errors import ConfigError, TropdError

ANSWER_SECONDS = 5.0
"""Time in which a server says what it gives."""


def row_needs(needs: Needs, config: Config) -> Needs:
    """The needs of a row: those of the run, with the row's configuration."""
    return replace(needs, config=config.model_copy(update={"runtime": needs.config.runtime}))


def check_table_rows(needs: Needs, rows: Mapping[str, Config], machine: Machine) -> list[Check]:
    """Check the training of every row; rows with the same answer share its line.

    Args:
        needs: of the run that they have in common.
        rows: configuration by name.
    """
    found: dict[Check, list[str]] = {}
    for name, config in rows.items():
        for check in check_training(row_needs(needs, config), machine):
            found.setdefault(check, []).append(name)
    return [
        check if len(names) == len(rows) else replace(check, what=f"{', '.join(names)}: {check.what}")
        for check, names in found.items()
    ]


def check_engines(run: Run, rows: Mapping[str, Config]) -> list[Check]:
    """Check that the teacher of every row gives what its objective needs: by its engine, or by asking its server."""
    asking = {name: config for name, config in rows.items() if config.objective.rollouts == "student"}
    found = []
    for name in [GENERAL, *(own.domain for own in run.config.teacher.by_domain)]:
        teacher = with_only(run, name).config.teacher
        whose = f"the teacher{name and f' of {name}'}"
        if teacher.urls:
            found += _ask(with_only(run, name), whose, asking)
        elif asking:
            wrong = [
                row
                for row, config in asking.items()
                if teacher_needs(config.objective).beyond_vllm and config.teacher.scorer == "vllm"
            ]
            text = f"{whose} gives what {len(asking)} rows need"
            if wrong:
                text = f"{', '.join(wrong)}: {whose} scores in vLLM, which gives neither entropies nor log-probs "
                text += "of ids that the student chose; set "
                text += "teacher.scoring_engine = 'transformers'"
            found.append(Check(not wrong, text))
    return found


def _ask(run: Run, whose: str, rows: Mapping[str, Config]) -> list[Check]:
    """What the servers of a teacher give, compared with every row's needs; not checked where none answers."""
    teacher = run.config.teacher
    client = TeacherClient(
        teacher.urls,
        token=os.environ.get(teacher.token_env) or None,
        timeout_seconds=ANSWER_SECONDS,
        on_wait=lambda reason: None,
        sleep=time.sleep,
    )
    found = []
    with client:
        try:
            client.info()
        except TropdError as error:
            return [Check(None, f"{whose} was not asked for what it gives: {error.message}")]
        for name, config in rows.items():
            try:
                client.check_gives(teacher_needs(config.objective), config.objective)
            except ConfigError as error:
                found.append(Check(False, f"{name}: {error.message}; {error.hint}"))
    return found or [Check(True, f"{whose} at {client.url} gives what {len(rows)} rows need")]
