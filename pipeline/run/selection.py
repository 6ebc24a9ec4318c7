"""The problems a run trains on and is measured by: usable, not contaminated, encoded, with their fingerprint fields."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tropd.pipeline.config.sections.data_settings import DataConfig
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.problems.decontaminate import find_overlaps
from tropd.pipeline.problems.encoding import Encoded, encode_prompts
from tropd.pipeline.problems.prompts import refuse, scan_prompts, write_rejects
from tropd.pipeline.problems.teacher_context import named_fields
from tropd.pipeline.run.identity import section_fields, template_fields
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest, write_text_atomic
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.stage.fingerprint import Scalar


def training_prompts(run: Run, tokenizer: Any, max_length: int) -> Encoded:
    """The training prompts with their token ids; each leaves room for a response in ``max_length``."""
    data = run.config.data
    room = _room(max_length, run.config.rollout.max_tokens)
    return _usable_prompts(
        run,
        data,
        _data_file(run, "prompts"),
        "prompts",
        tokenizer,
        room,
        data.limit,
        need_answer=run.config.prefixes.keep == "correct",
        left_out=_contaminated(run),
        template_args=run.config.student.chat_template_args,
        also=partial(_context_fields, run),
    )


def _room(max_length: int, max_tokens: int) -> int:
    """Tokens that a response of so many tokens leaves for a prompt.

    Raises:
        ConfigError: nothing.
    """
    if max_tokens >= max_length:
        raise ConfigError(
            f"responses of {max_tokens} tokens leave no room for a prompt: the model takes {max_length}",
            hint=f"set rollout.max_tokens (evaluation.max_tokens where that is set) below {max_length}",
        )
    return max_length - max_tokens


def _contaminated(run: Run) -> set[str]:
    """Ids of training prompts that are left out because an evaluation problem is like them; they are listed."""
    words = run.config.data.decontaminate
    if words is None:
        return set()
    found, compared = find_overlaps(run.workspace, run.config, words)
    target = run.workspace.root / "rejects" / "contaminated.jsonl"
    write_text_atomic(target, "".join(json.dumps(vars(overlap)) + "\n" for overlap in found))
    if found:
        run.reporter.warning(
            f"{len(found)} of {compared} training prompts share {words} words with an evaluation problem and are left "
            f"out; {target} lists them"
        )
    return {overlap.prompt for overlap in found}


def evaluation_problems(
    run: Run,
    tokenizer: Any,
    max_length: int,
    name: str = "",
    role: str = "student",
    *,
    unanswered: bool = False,
) -> Encoded:
    """The problems of an evaluation set (``Config.evaluation_sets``) with their token ids, as a role reads them.

    Those of [evaluation] itself need no answer where the distance to the teacher is measured on them.

    Args:
        unanswered: they need none, whatever is measured, since a teacher reads them.
    """
    data, settings = run.config.problem_files[name], run.config.evaluation_sets[name]
    role_settings: ModelConfig = getattr(run.config, role)
    compared = unanswered or (not name and role == "student" and settings.distance_prompts > 0)
    room = _room(max_length, settings.max_tokens or run.config.rollout.max_tokens)
    return _usable_prompts(
        run,
        data,
        _data_file(run, "evaluation", name),
        name or "evaluation",
        tokenizer,
        room,
        settings.limit,
        need_answer=not unanswered and (bool(name) or not settings.distance_prompts),
        template_args=role_settings.chat_template_args,
        also=partial(_context_fields, run) if compared else lambda domain: {},
    )


def evenly(count: int, wanted: int) -> list[int]:
    """Indices of at most so many of ``count`` things in a row, evenly over all of them."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


def _context_fields(run: Run, domain: str) -> dict[str, str]:
    """Fields of a record that the context of its teacher names, and the setting that names each."""
    teacher = run.config.teacher
    own = [f"teacher.by_domain.{n}" for n, one in enumerate(teacher.by_domain) if one.domain == domain]
    table = f"{own[0] if own else 'teacher'}.context"
    return {name: f"{table}.{text}" for name, text in named_fields(teacher.context_of(domain)).items()}


def _usable_prompts(
    run: Run,
    data: DataConfig,
    path: Path,
    what: str,
    tokenizer: Any,
    room: int,
    limit: int | None,
    need_answer: bool,
    left_out: Collection[str] = (),
    template_args: Mapping[str, Any] = {},
    also: Callable[[str], Mapping[str, str]] = lambda domain: {},
) -> Encoded:
    """Prompts that are whole and fit. Others stop the stage, or go to ``rejects/`` with ``data.skip_bad``."""
    prompts, bad_lines = scan_prompts(
        path, data, need_answer=need_answer, check_answer=what != "prompts", also=also
    )
    prompts = [prompt for prompt in prompts if prompt.id not in left_out]
    date = template_date(run)
    encoded = encode_prompts(
        prompts,
        tokenizer,
        chat=data.chat,
        template_args=template_args,
        max_length=room,
        limit=limit,
        date=date,
    )
    rejects = sorted([*bad_lines, *encoded.rejects], key=lambda reject: reject.line)
    if not data.skip_bad:
        refuse(path, rejects)
    elif rejects:
        target = run.workspace.root / "rejects" / f"{what}.jsonl"
        write_rejects(path, rejects, target)
        run.reporter.warning(f"{path}: {len(rejects)} bad line(s) left out, listed in {target}")
    if not encoded.prompts:
        raise DataError(f"{path}: no usable prompt is left of {len(rejects)}")
    for note in encoded.notes:
        run.reporter.warning(f"{path}: {note}")
    if encoded.date is not None and date is None:
        run.workspace.keep_template_date(encoded.date)
        run.reporter.info(
            f"the chat template writes the date into prompts: {encoded.date} in this workspace from now on "
            "(data.template_date sets another)"
        )
    return encoded


def template_date(run: Run) -> datetime.date | None:
    """The date for chat templates, where it is fixed already."""
    return run.config.data.template_date or run.workspace.template_date()


def with_template_date(run: Run) -> Run:
    """The run with that date among its settings, for workspaces that are made from it."""
    config = run.config
    data = config.data.model_copy(update={"template_date": template_date(run)})
    return replace(run, resolved=replace(run.resolved, config=config.model_copy(update={"data": data})))


def data_fields(run: Run, which: str, name: str = "") -> dict[str, Scalar]:
    """Fingerprint fields of ``prompts`` or ``evaluation`` (of a set by its name): content, and how it is read."""
    data = run.config.problem_files[name]
    path = _data_file(run, which, name)
    fields: dict[str, Scalar] = {f"data.{which}": content_digest(path)}
    also = {"limit"} if which == "prompts" else set()
    also |= {"system"} if data.system is not None else set()
    also |= {"domain_field"} if which == "prompts" and run.config.teacher.by_domain else set()
    if which == "prompts" and data.decontaminate is not None:
        also |= {"decontaminate"}
        for benchmark in run.config.problem_files:
            problems = _data_file(run, "evaluation", benchmark)
            fields[f"data.decontaminate.{benchmark or 'evaluation'}"] = content_digest(problems)
    if which == "prompts":
        fields |= template_fields(run, "student")
    return fields | section_fields("data", data, also=also)


def _data_file(run: Run, which: str, name: str = "") -> Path:
    path = run.workspace.resolve(getattr(run.config.problem_files[name], which))
    if not path.is_file():
        theirs = any(one.name == name and one.lighteval is not None for one in run.config.benchmarks)
        hint = "set data.prompts / data.evaluation; for the demo recipes run tropd prepare first"
        raise DataError(
            f"{f'benchmark {name!r}' if name else f'data.{which}'}: {path} does not exist",
            hint="tropd fetch writes lighteval's questions there" if theirs else hint,
        )
    return path
