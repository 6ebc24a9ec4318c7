"""What the stages share: loading the run's models and data, and the fingerprint fields that identify them."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.pipeline.config import Config, DataConfig, ModelConfig, to_plain
from tropd.pipeline.configuration import ResolvedConfig
from tropd.pipeline.decontamination import find_overlaps
from tropd.pipeline.engines.base import Engine
from tropd.pipeline.engines.transformers import TransformersEngine
from tropd.pipeline.memory import within_memory
from tropd.pipeline.model_files import check_for_vllm
from tropd.pipeline.models import (
    check_model,
    configure_runtime,
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
    model_directory,
    weights_digest,
)
from tropd.pipeline.problems.encoding import Encoded, encode_prompts
from tropd.pipeline.progress import Reporter
from tropd.pipeline.prompts import refuse, scan_prompts, write_rejects
from tropd.pipeline.stops import differing_stops, stop_ids
from tropd.pipeline.tokenizers import check_tokenizers, num_tokens, tokenizer_identity
from tropd.storage.atomic import content_digest, write_text_atomic
from tropd.storage.errors import ConfigError, DamagedShardError, DataError, TropdError
from tropd.storage.fingerprint import Scalar, flatten
from tropd.storage.manifest import FILE_NAME as MANIFEST
from tropd.storage.manifest import Manifest, holds_output, read_manifest
from tropd.storage.workspace import Workspace

if TYPE_CHECKING:
    from tropd.pipeline.engines.vllm import VllmEngine


@dataclass(frozen=True)
class Run:
    """A workspace with its checked configuration, and who listens."""

    workspace: Workspace
    resolved: ResolvedConfig
    reporter: Reporter
    assignments: tuple[str, ...] = ()
    """The ``--set`` overrides that the configuration was read with, to pass on to processes started for the run."""

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def timings(self) -> Path:
        """Log of the stages' times."""
        return self.workspace.logs / "stages.jsonl"

    def command(self, name: str) -> str:
        """The command line that runs ``name`` (options may follow it) on this run, as one would type it."""
        overrides = [part for assignment in self.assignments for part in ("--set", assignment)]
        return " ".join([self.workspace.command(name), *map(shlex.quote, overrides)])


def with_teacher(run: Run, url: str) -> Run:
    """The run with its teacher at a service that is already there."""
    config = run.config
    teacher = config.teacher.model_copy(update={"url": url})
    resolved = replace(run.resolved, config=config.model_copy(update={"teacher": teacher}))
    return replace(run, resolved=resolved)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer."""

    folder: Path
    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    """Token ids that end its responses."""
    compiles: bool = False
    """Whether its layers are to be compiled."""

    def engine(
        self, *, batch_size: int, batch_tokens: int = 16384, autocast: torch.dtype | None = None
    ) -> TransformersEngine:
        return TransformersEngine(
            self.model,
            self.stop_ids,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            num_tokens=num_tokens(self.tokenizer),
            autocast=autocast,
            compiles=self.compiles,
        )


@contextmanager
def loading(run: Run, role: str, folder: Path) -> Iterator[None]:
    """Say that a model is being loaded, and what helps if it does not fit."""
    advice = (
        f'set {role}.dtype = "bfloat16", take a smaller model, or free memory; {run.workspace.command("plan")} shows '
        "what the run needs"
    )
    with (
        run.reporter.waiting(f"loading the {role} from {folder}"),
        within_memory(f"the weights of the {role} ({folder})", advice),
    ):
        yield


def load_role(run: Run, role: str, folder: Path | None = None) -> LoadedModel:
    """Load ``teacher`` or ``student`` (or another directory with that role's settings) for inference."""
    settings: ModelConfig = getattr(run.config, role)
    device = configure_runtime(run.config.runtime)
    folder = folder or model_directory(run.workspace, settings, role)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    with loading(run, role, folder):
        model = load_model(
            folder, dtype=settings.dtype, device=device, trust_remote_code=settings.trust_remote_code
        )
    ends = stop_ids(run.workspace, run.config, role, folder)
    return LoadedModel(folder, model, tokenizer, ends, run.config.runtime.compile)


def open_engine(
    run: Run, role: str, folder: Path | None = None, *, batch_size: int, batch_tokens: int = 16384
) -> tuple[Engine, Any]:
    """The engine that a role is configured with, and its tokenizer.

    Args:
        folder: another directory than the role's own, with its settings.
        batch_size: sequences decoded together, where the engine does not decide that itself.
        batch_tokens: tokens, padding included, per scoring pass, likewise.
    """
    settings: ModelConfig = getattr(run.config, role)
    if settings.engine == "transformers":
        loaded = load_role(run, role, folder)
        return loaded.engine(batch_size=batch_size, batch_tokens=batch_tokens), loaded.tokenizer
    engine = open_vllm(run, role, folder)
    return engine, role_tokenizer(run, role)


def open_vllm(run: Run, role: str, folder: Path | None = None, *, in_training: bool = False) -> VllmEngine:
    """The model of a role inside vLLM (``in_training``: see there)."""
    from tropd.pipeline.engines.vllm import VllmEngine

    settings: ModelConfig = getattr(run.config, role)
    configure_runtime(run.config.runtime)
    folder = folder or model_directory(run.workspace, settings, role)
    config = load_model_config(folder, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    if not in_training:
        check_for_vllm(folder)
    with loading(run, role, folder):
        return VllmEngine(
            folder,
            stop_ids(run.workspace, run.config, role, folder),
            run.config.vllm,
            dtype=settings.dtype,
            num_tokens=num_tokens(tokenizer),
            max_length=context_length(config),
            most_topk=max(run.config.scores.k, run.config.objective.k),
            trust_remote_code=settings.trust_remote_code,
            in_training=in_training,
        )


def engine_fields(run: Run, role: str) -> dict[str, Scalar]:
    """Fingerprint fields of the engine that runs a role: its numerics differ in the last digits."""
    settings: ModelConfig = getattr(run.config, role)
    if settings.engine == "transformers":
        return {}
    quantization = run.config.vllm.quantization
    return {f"{role}.engine": settings.engine} | (
        {"vllm.quantization": quantization} if quantization is not None else {}
    )


def role_tokenizer(run: Run, role: str) -> Any:
    """The tokenizer of a role without its weights."""
    settings: ModelConfig = getattr(run.config, role)
    folder = model_directory(run.workspace, settings, role)
    return load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)


def role_room(run: Run, role: str) -> int:
    """Most tokens that a role's engine takes, from the configurations of model and run."""
    config = _role_config(run, role)
    longest = context_length(config)
    claimed = getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    if longest < claimed:
        run.reporter.warning(
            f"{role}.model takes {claimed} tokens, but here its sequences end at {longest}: beyond, its rotary positions "
            "become others for a whole batch, so that log-probs would depend on the rows beside a row"
        )
    settings: ModelConfig = getattr(run.config, role)
    return longest if settings.engine == "transformers" else run.config.vllm.room(longest)


def role_num_tokens(run: Run, role: str) -> int:
    """Ids that a role samples and scores: those of its tokenizer (see ``check_model``)."""
    return num_tokens(role_tokenizer(run, role))


def _role_config(run: Run, role: str) -> Any:
    settings: ModelConfig = getattr(run.config, role)
    folder = model_directory(run.workspace, settings, role)
    return load_model_config(folder, trust_remote_code=settings.trust_remote_code)


def check_pair(run: Run) -> None:
    """Refuse a student and a teacher whose token ids differ in meaning, before any weights are read.

    Where they end their responses differently, this is said.
    """
    student = role_tokenizer(run, "student")
    check_tokenizers(student, role_tokenizer(run, "teacher"), chat=run.config.data.chat)
    if (difference := differing_stops(run.workspace, run.config, student)) is not None:
        run.reporter.warning(difference)


def training_prompts(run: Run, tokenizer: Any, max_length: int) -> Encoded:
    """The training prompts with their token ids; each leaves room for a response in ``max_length``."""
    data = run.config.data
    room = _room(max_length, run.config.rollout.max_tokens)
    need_answer = run.config.prefixes.keep == "correct"
    left_out = _contaminated(run)
    return _usable_prompts(
        run, data, _data_file(run, "prompts"), "prompts", tokenizer, room, data.limit, need_answer, left_out
    )


def _room(max_length: int, max_tokens: int) -> int:
    """What a response of so many tokens leaves for a prompt.

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
    run: Run, tokenizer: Any, max_length: int, limit: int | None, name: str = ""
) -> Encoded:
    """The problems of an evaluation set (``Config.evaluation_sets``) with their token ids."""
    data = run.config.problem_files[name]
    room = _room(max_length, run.config.evaluation_sets[name].max_tokens or run.config.rollout.max_tokens)
    return _usable_prompts(
        run,
        data,
        _data_file(run, "evaluation", name),
        name or "evaluation",
        tokenizer,
        room,
        limit,
        need_answer=True,
    )


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
) -> Encoded:
    """Prompts that are whole and fit. Others stop the stage, or go to ``rejects/`` with ``data.skip_bad``."""
    prompts, bad_lines = scan_prompts(path, data, need_answer=need_answer)
    prompts = [prompt for prompt in prompts if prompt.id not in left_out]
    date = _template_date(run)
    encoded = encode_prompts(prompts, tokenizer, chat=data.chat, max_length=room, limit=limit, date=date)
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


def _template_date(run: Run) -> datetime.date | None:
    """The date for chat templates, where it is fixed already."""
    return run.config.data.template_date or run.workspace.template_date()


def with_template_date(run: Run) -> Run:
    """The run with that date among its settings, for workspaces that are made from it."""
    config = run.config
    data = config.data.model_copy(update={"template_date": _template_date(run)})
    return replace(run, resolved=replace(run.resolved, config=config.model_copy(update={"data": data})))


def model_fields(run: Run, role: str, folder: Path | None = None) -> dict[str, Scalar]:
    """Fingerprint fields of a model: weights, tokenizer, precision. A model that is not whole has none.

    Raises:
        ConfigError, DataError: see ``check_model``.
    """
    settings: ModelConfig = getattr(run.config, role)
    folder = folder or model_directory(run.workspace, settings, role)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    with run.reporter.waiting(f"reading the weights of the {role} in {folder}"):
        digest = weights_digest(folder)
    return {
        f"{role}.weights": digest,
        f"{role}.tokenizer": tokenizer_identity(tokenizer).digest,
        f"{role}.dtype": settings.dtype,
    }


def data_fields(run: Run, which: str, name: str = "") -> dict[str, Scalar]:
    """Fingerprint fields of ``prompts`` or ``evaluation`` (of a set by its name): content, and how it is read."""
    data = run.config.problem_files[name]
    path = _data_file(run, which, name)
    fields: dict[str, Scalar] = {f"data.{which}": content_digest(path)}
    names = {"id_field", "prompt_field", "answer_field", "template", "chat"}
    names |= {"limit"} if which == "prompts" else set()
    names |= {"domain_field"} if which == "prompts" and run.config.teacher.by_domain else set()
    if which == "prompts" and data.decontaminate is not None:
        names |= {"decontaminate"}
        for benchmark in run.config.problem_files:
            problems = _data_file(run, "evaluation", benchmark)
            fields[f"data.decontaminate.{benchmark or 'evaluation'}"] = content_digest(problems)
    return fields | flatten("data", {k: v for k, v in to_plain(data).items() if k in names})


def _data_file(run: Run, which: str, name: str = "") -> Path:
    path = run.workspace.resolve(getattr(run.config.problem_files[name], which))
    if not path.is_file():
        raise DataError(
            f"{f'benchmark {name!r}' if name else f'data.{which}'}: {path} does not exist",
            hint="set data.prompts / data.evaluation; for the demo recipes run tropd prepare first",
        )
    return path


def section_fields(section: str, spec: Any, *, without: Collection[str] = ()) -> dict[str, Scalar]:
    """Fingerprint fields of a configuration section, less those that do not decide the result."""
    return flatten(section, {k: v for k, v in to_plain(spec).items() if k not in without})


def finished(run: Run, stage: str, command: str) -> Manifest:
    """The manifest of an upstream stage.

    Raises:
        TropdError: it is not complete; the message names the command that makes it.
        DamagedShardError: the manifest is missing while there is output, or is not readable.
    """
    folder = run.workspace.stage(stage)
    manifest = read_manifest(folder)
    if manifest is None and holds_output(folder):
        raise DamagedShardError(
            f"{folder / MANIFEST} is missing, and without it nothing is known of what is beside it",
            hint=f"put it back from a copy, or make the stage anew: {run.command(command)} --force",
        )
    if manifest is None:
        raise TropdError(f"stage {stage!r} was not run", hint=run.command(command))
    if not manifest.complete:
        so_far = f"{folder / MANIFEST} lists {len(manifest.shards)} shards so far"
        raise TropdError(f"stage {stage!r} is not finished: {so_far}", hint=run.command(command))
    return manifest
