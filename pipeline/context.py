"""What the stages share: a run, its models in memory, what identifies these, and the stages that it builds on."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.pipeline.automatic import settled
from tropd.pipeline.config import Config, ModelConfig, to_plain
from tropd.pipeline.configuration import ResolvedConfig
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
from tropd.pipeline.objectives.spec import Spec, marks
from tropd.pipeline.progress import Reporter
from tropd.pipeline.stops import differing_stops, stop_ids
from tropd.pipeline.tokenizers import check_tokenizers, num_tokens, tokenizer_identity
from tropd.storage.errors import DamagedShardError, TropdError
from tropd.storage.fingerprint import Scalar, flatten
from tropd.storage.manifest import FILE_NAME as MANIFEST
from tropd.storage.manifest import Manifest, holds_output, read_manifest
from tropd.storage.workspace import Workspace, stage_kind

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

    @cached_property
    def config(self) -> Config:
        """The checked configuration, with what was left automatic decided (see ``automatic``)."""
        return settled(self.workspace, self.resolved.config, self.resolved.origins)

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
            folder, dtype=settings.settled_dtype, device=device, trust_remote_code=settings.trust_remote_code
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
            dtype=settings.settled_dtype,
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
        f"{role}.dtype": settings.settled_dtype,
    }


def section_fields(section: str, spec: Spec, *, also: Collection[str] = ()) -> dict[str, Scalar]:
    """Fingerprint fields of a configuration section: those without a mark (see ``Mark``), and ``also`` these."""
    marked = marks(type(spec))
    return flatten(section, {k: v for k, v in to_plain(spec).items() if k in also or k not in marked})


def finished(run: Run, stage: str) -> Manifest:
    """The manifest of an upstream stage.

    Raises:
        TropdError: it is not complete; the message names the command that makes it.
        DamagedShardError: the manifest is missing while there is output, or is not readable.
    """
    folder, command = run.workspace.stage(stage), run.command(stage_kind(stage).command)
    manifest = read_manifest(folder)
    if manifest is None and holds_output(folder):
        raise DamagedShardError(
            f"{folder / MANIFEST} is missing, and without it nothing is known of what is beside it",
            hint=f"put it back from a copy, or make the stage anew: {command} --force",
        )
    if manifest is None:
        raise TropdError(f"stage {stage!r} was not run", hint=command)
    if not manifest.complete:
        so_far = f"{folder / MANIFEST} lists {len(manifest.shards)} shards so far"
        raise TropdError(f"stage {stage!r} is not finished: {so_far}", hint=command)
    return manifest
