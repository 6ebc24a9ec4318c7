"""Opening a run's models: the engine, tokenizer and limits that a role is configured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.pipeline.config.sections.model_settings import ModelConfig, RuntimeConfig
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import (
    check_model,
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
)
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.models.model_files import check_for_vllm
from tropd.pipeline.models.runtime import configure_runtime
from tropd.pipeline.models.stops import differing_stops, stop_ids
from tropd.pipeline.models.tokenizers import check_tokenizers, has_response_place, num_tokens

if TYPE_CHECKING:
    from tropd.pipeline.models.engines.vllm import VllmEngine
from tropd.pipeline.run.run import Run
from tropd.storage.errors import ConfigError


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
    graphs: bool = False
    """Whether it decodes with CUDA graphs, on a GPU."""

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
            graphs=self.graphs,
        )


@contextmanager
def loading(run: Run, role: str, folder: Path) -> Iterator[None]:
    """Report that a model is being loaded; if it does not fit, say which settings help."""
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
    tokenizer = role_tokenizer(run, role, folder)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    with loading(run, role, folder):
        model = load_model(
            folder, dtype=settings.settled_dtype, device=device, trust_remote_code=settings.trust_remote_code
        )
    ends = stop_ids(run.workspace, run.config, role, folder)
    runtime = run.config.runtime
    return LoadedModel(folder, model, tokenizer, ends, runtime.compile, runtime.cuda_graphs)


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


def open_vllm(run: Run, role: str, folder: Path | None = None) -> VllmEngine:
    """The model of a role inside vLLM, in this process."""
    folder = folder or model_directory(run.workspace, getattr(run.config, role), role)
    build = vllm_builder(run, role, folder)
    with loading(run, role, folder):
        return build()


def vllm_builder(run: Run, role: str, folder: Path, *, in_training: bool = False) -> Callable[[], VllmEngine]:
    """Opens the model of a role inside vLLM, in whichever process calls it (``in_training``: see there)."""
    settings: ModelConfig = getattr(run.config, role)
    config = load_model_config(folder, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    if not in_training:
        check_for_vllm(folder)
    return partial(
        _vllm_engine,
        run.config.runtime,
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


def _vllm_engine(runtime: RuntimeConfig, *arguments: Any, **options: Any) -> VllmEngine:
    from tropd.pipeline.models.engines.vllm import VllmEngine

    configure_runtime(runtime)
    return VllmEngine(*arguments, **options)


def role_tokenizer(run: Run, role: str, folder: Path | None = None) -> Any:
    """The tokenizer of a role without its weights, with the chat template that its settings name.

    Args:
        folder: another directory than the role's own, with its settings.

    Raises:
        ConfigError: no tokenizer, or no template is there.
    """
    settings: ModelConfig = getattr(run.config, role)
    folder = folder or model_directory(run.workspace, settings, role)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    if (path := template_file(run, role)) is not None:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        if not has_response_place(tokenizer, settings.chat_template_args):
            raise ConfigError(
                f"{role}.chat_template_file: {path} has no place for a response: it leaves out what the assistant says",
                hint="write every message, and with add_generation_prompt the beginning of the assistant's",
            )
    return tokenizer


def template_file(run: Run, role: str) -> Path | None:
    """The file of a role's chat template; None where it is its tokenizer's own.

    Raises:
        ConfigError: it is not there, or not text.
    """
    settings: ModelConfig = getattr(run.config, role)
    if settings.chat_template_file is None:
        return None
    path = run.workspace.resolve(settings.chat_template_file)
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise ConfigError(
            f"{role}.chat_template_file: {path} {reason}", hint="name a file with a chat template in Jinja"
        ) from error
    return path


def role_room(run: Run, role: str) -> int:
    """Most tokens that a role's engines take, from the configurations of model and run."""
    config = _role_config(run, role)
    longest = context_length(config)
    claimed = getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    if longest < claimed:
        run.reporter.warning(
            f"{role}.model takes {claimed} tokens, but here its sequences end at {longest}: beyond that, its rotary "
            "positions change for a whole batch, and log-probs would depend on the other rows of it"
        )
    settings: ModelConfig = getattr(run.config, role)
    return run.config.vllm.room(longest) if "vllm" in (settings.engine, settings.scorer) else longest


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
    check_tokenizers(student, role_tokenizer(run, "teacher"))
    if (difference := differing_stops(run.workspace, run.config, student)) is not None:
        run.reporter.warning(difference)
