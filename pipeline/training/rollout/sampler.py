"""The engine that rolls out with the student's weights, and how these get there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.config.sections.model_settings import RuntimeConfig, StudentConfig
from tropd.pipeline.config.sections.training_settings import RolloutConfig
from tropd.pipeline.config.sections.value_types import Dtype
from tropd.pipeline.models.engines.base import Choose, Sampler, choose_with
from tropd.pipeline.models.engines.child.process import Deadline, Deadlines, EngineProcess
from tropd.pipeline.models.engines.child.vllm_transfer import for_vllm
from tropd.pipeline.models.engines.child.weights import can_hand_over
from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.loading import context_length, load_model, load_tokenizer
from tropd.pipeline.models.runtime import DTYPES, configure_runtime
from tropd.pipeline.run.opening import LoadedModel, loading, vllm_builder
from tropd.pipeline.run.processes.child_environment import child_environment
from tropd.pipeline.run.run import Run
from tropd.pipeline.training.rollout.rows import sampling_of
from tropd.pipeline.training.rollout.sampler_process import SamplingProcess
from tropd.pipeline.training.update.lora import merged_state
from tropd.pipeline.training.update.student import copy_weights
from tropd.pipeline.training.world import World


@dataclass(frozen=True)
class Rolling:
    """The engine that rolls out, and how it gets new weights and ends."""

    engine: Sampler
    """Rolls out with the student's weights."""
    whole_model: Any
    """The full student: the model itself, or an unsharded copy refreshed together with the engine."""
    refresh: Callable[[], None]
    """Copy the current weights into the engine and ``whole_model``. Call only while the engine is idle."""
    gather: Callable[[], None]
    """Copy them into ``whole_model`` only; every process takes part."""
    checked: EngineProcess | None = None
    """The engine, where it is another than the trainer's and could have other weights."""
    rest: Callable[[], None] = lambda: None
    """Free the engine's memory until the next refresh, where it is idle until then and can."""
    choose: Choose | None = None
    """Chooses the likeliest ids with the engine's weights; None where the engine cannot."""
    close: Callable[[], None] = lambda: None
    """End the engine's own process, if it has one."""


def rollout_engine(
    run: Run,
    stack: ExitStack,
    student: LoadedModel,
    whole_model: Any,
    folder: Path,
    precision: torch.dtype | None,
    world: World,
) -> Rolling:
    """Open the engine that the configuration asks for, in this process or in one beside it."""
    settings = run.config.student
    sharded = whole_model is not student.model

    def gather() -> None:
        if sharded:
            copy_weights(student.model, whole_model)

    if settings.engine == "transformers":
        autocast = None if sharded else precision
        if run.config.train.max_staleness:
            dtype: Dtype = "float32" if not sharded and settings.lora is None else settings.settled_dtype
            return _process_engine(run, stack, student, whole_model, dtype, autocast, gather)
        loaded = replace(student, model=whole_model)
        engine = loaded.engine(batch_size=run.config.rollout.batch_size, autocast=autocast)
        return Rolling(engine, whole_model, gather, gather, choose=choose_with(engine))
    beside = _vllm_process(run, whole_model, folder, world)
    stack.callback(beside.close)

    def refresh() -> None:
        gather()
        if whole_model.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine's memory is what the step before has freed
        beside.set_weights(merged_state(whole_model))

    def rest() -> None:
        if not run.config.train.max_staleness:  # otherwise it samples while the student trains
            beside.rest()

    return Rolling(beside, whole_model, refresh, gather, beside, rest, beside.choose, beside.close)


def _vllm_process(run: Run, whole_model: Any, folder: Path, world: World) -> EngineProcess:
    """The student in vLLM, in a process beside this one, on the same GPU."""
    settings = run.config.vllm
    alone = settings.tensor_parallel_size == 1
    as_handles = whole_model.device.type == "cuda" and alone and can_hand_over(os.environ)
    log = run.workspace.logs / f"student-engine-{world.rank}.log"
    with loading(run, "student", folder):
        engine = EngineProcess(
            vllm_builder(run, "student", folder, in_training=True),
            merged_state(whole_model),
            DTYPES[run.config.student.settled_dtype],
            environment=for_vllm(child_environment(one_device=alone)),
            log=log,
            deadlines=Deadlines(
                Deadline(settings.start_seconds, "vllm.start_seconds"),
                Deadline(settings.update_seconds, "vllm.update_seconds"),
                Deadline(settings.answer_seconds, "vllm.answer_seconds"),
            ),
            as_handles=as_handles,
        )
    if not engine.sleeps:
        run.reporter.info(
            "train: vLLM cannot sleep on a CPU: the student's engine keeps its memory while it trains"
        )
    return engine


def _process_engine(
    run: Run,
    stack: ExitStack,
    student: LoadedModel,
    whole_model: Any,
    dtype: Dtype,
    autocast: torch.dtype | None,
    gather: Callable[[], None],
) -> Rolling:
    """Like ``rollout_engine``, in a process beside the one that trains."""
    state = merged_state(whole_model)
    build = partial(
        _sampling_engine,
        student.folder,
        student.stop_ids,
        run.config.student,
        run.config.runtime,
        dtype=dtype,
        rollout=run.config.rollout,
        autocast=autocast,
    )
    engine = SamplingProcess(build, state, context_length(whole_model.config))
    stack.callback(engine.close)

    def refresh() -> None:
        gather()
        engine.set_weights(merged_state(whole_model).items())

    return Rolling(engine, whole_model, refresh, gather, choose=engine.choose, close=engine.close)


def _sampling_engine(
    folder: Path,
    stop_ids: frozenset[int],
    settings: StudentConfig,
    runtime: RuntimeConfig,
    *,
    dtype: Dtype,
    rollout: RolloutConfig,
    autocast: torch.dtype | None,
) -> TransformersEngine:
    """The student as it is on disk; its weights are replaced before it samples."""
    device = configure_runtime(runtime)
    remote = settings.trust_remote_code
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=remote)
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    loaded = LoadedModel(folder, model, tokenizer, stop_ids, runtime.compile, runtime.cuda_graphs)
    engine = loaded.engine(batch_size=rollout.batch_size, autocast=autocast)
    engine.prepare(sampling_of(rollout))
    return engine
