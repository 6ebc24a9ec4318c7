"""Opening a training session: everything is checked and connected before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tropd.pipeline.config.schema import Config
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.engines.base import Engine
from tropd.pipeline.models.engines.lean.compiled import compile_layers
from tropd.pipeline.models.runtime import DTYPES, configure_runtime
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.pipeline.objectives.needs import needs_reference, teacher_needs
from tropd.pipeline.problems.encoding import Encoded, tokens_of
from tropd.pipeline.run.opening import LoadedModel, load_role, loading, role_tokenizer
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import evenly
from tropd.pipeline.teacher.by_domain import GENERAL
from tropd.pipeline.teacher.client.client import TeacherClient
from tropd.pipeline.teacher.connect import connect_teachers, start_teachers
from tropd.pipeline.teacher.local_service import LocalTeacher
from tropd.pipeline.training.distance.held_out_set import read_held_out
from tropd.pipeline.training.extrapolation.base_weights import BaseWeights
from tropd.pipeline.training.inputs import read_inputs
from tropd.pipeline.training.preflight.preflight import gathers_once
from tropd.pipeline.training.reward.judges import open_judge
from tropd.pipeline.training.rollout.sampler import rollout_engine
from tropd.pipeline.training.session import Session
from tropd.pipeline.training.signal.following_teacher import FollowingTeacher, open_following_teacher
from tropd.pipeline.training.update.lora import check_peft
from tropd.pipeline.training.update.optimizer import make_optimizer
from tropd.pipeline.training.update.student import (
    StudentPass,
    check_attention,
    shard,
    trainable_student,
    whole_student,
)
from tropd.pipeline.training.update.trainer_proof import prove_pass
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError


def open_session(
    run: Run,
    stack: ExitStack,
    world: World,
    prompts: Encoded,
    on_wait: Callable[[str], None],
    sleep: Callable[[float], None],
) -> Session:
    """Load student and data, start or reach the teacher service, and check that all fits together.

    Args:
        prompts: to train on.
        on_wait: called with the reason why nothing happens while the teacher is away.
        sleep: waits between two attempts to reach it; may raise to end the wait.

    Raises:
        ConfigError, DataError, TropdError: before any training has happened.
    """
    _check_settings(run, world)
    config, objective = run.config, run.config.objective
    needs = teacher_needs(objective)
    device = configure_runtime(config.runtime)
    folder = model_directory(run.workspace, config.student, "student")
    dtype = config.student.settled_dtype
    precision = None if dtype == "float32" else DTYPES[dtype]
    inputs = read_inputs(run, needs, prompts)  # before anything is loaded or started
    judge = open_judge(run, stack, inputs, role_tokenizer(run, "student"))
    # Before services take memory: a teacher is loaded here for it.
    held_out = None
    if inputs.problems is not None and config.evaluation.distance_prompts:
        held_out = world.tell(read_held_out(run, inputs.problems) if world.leads else None)
    asks = needs.token_logprobs and objective.rollouts != "stored"
    # A teacher loads while the student does; but vLLM measures how much memory is free while it loads.
    at_once = "vllm" not in (config.teacher.scorer, config.student.engine)
    serves = asks and config.teacher.follow is None
    started = start_teachers(run, stack, rank=world.rank) if serves and at_once else {}
    with loading(run, "student", folder):
        student = trainable_student(run, folder, device, world)
    whole_model = student.model if world.size == 1 else whole_student(run, folder)
    rolling = rollout_engine(run, stack, student, whole_model, folder, precision, world)
    longest = max(len(one.scored_after) for one in inputs.prompts) + config.rollout.max_tokens
    following = open_following_teacher(run) if asks else None
    scorers: dict[str, TeacherClient | FollowingTeacher] = {GENERAL: following} if following else {}
    if serves:
        if not at_once:
            started = start_teachers(run, stack, rank=world.rank)
        scorers |= _connect(run, stack, world, started, student, longest, on_wait, sleep)
    passes = StudentPass(student.model, precision, num_tokens(student.tokenizer))
    if config.train.attention != "auto" and (
        passes.packing == "padded" or (config.train.attention == "varlen" and not passes.in_rows)
    ):
        raise ConfigError(
            f"with train.attention = {config.train.attention!r} {type(student.model).__name__} mixes the rows "
            "that are packed into one line",
            hint='set train.attention = "auto"',
        )
    if student.compiles:
        compile_layers(student.model)
    # Everywhere or nowhere: otherwise the processes would wait for each other.
    roomy = world.size > 1 and all(
        world.gather(gathers_once(run, world.size, longest - config.rollout.max_tokens))
    )
    shard(passes, world, gathers_once=roomy)
    prove_pass(passes, whole_model, tokens_of(inputs.prompts))
    extrapolation = objective.extrapolation
    return Session(
        run=run,
        world=world,
        aside=world.aside() if config.train.max_staleness else world,
        inputs=inputs,
        student=student,
        passes=passes,
        rolling=rolling,
        optimizer=make_optimizer(student.model, config.train),
        scorers=scorers,
        reference=_reference(run, folder),
        problems=_graded(run, inputs.problems),
        held_out=held_out,
        judge=judge,
        base_weights=None if extrapolation is None else BaseWeights(student.model, extrapolation.parameters),
    )


def _graded(run: Run, problems: Encoded | None) -> Encoded | None:
    if problems is None:
        return None
    graded = [one for one in problems.prompts if one.prompt.answer is not None]
    some = evenly(len(graded), run.config.train.evaluate_problems)
    return replace(problems, prompts=[graded[i] for i in some])


def check_processes(config: Config, count: int) -> None:
    """Refuse settings that so many training processes cannot satisfy.

    Raises:
        ConfigError: naming the setting.
    """
    if count == 1:
        return
    if config.student.engine == "vllm" and config.vllm.tensor_parallel_size > 1:
        raise ConfigError(
            f"vllm.tensor_parallel_size = {config.vllm.tensor_parallel_size}, but with several processes each has the "
            "student's engine on its own GPU",
            hint="set vllm.tensor_parallel_size = 1; a teacher that is spread over GPUs is served by tropd serve-teacher "
            "(teacher.url)",
        )
    for name, wanted, remedy in (
        ("train.region_gradients", config.train.region_gradients, "set it to false"),
        ("teacher.follow", config.teacher.follow is not None, "leave it out"),
    ):
        if wanted:
            raise ConfigError(
                f"{name} needs a single process, and this run would train in {count}",
                hint=f"{remedy}, or train with --gpus 1, without torchrun",
            )


def _check_settings(run: Run, world: World) -> None:
    """Refuse settings that this machine, or its processes, cannot satisfy, before anything is loaded.

    Raises:
        ConfigError: naming the setting.
    """
    config = run.config
    check_peft(config.student.lora)
    check_attention(run, world)
    check_processes(config, world.size)
    if config.teacher.follow is not None and config.teacher.settled_dtype != "float32":
        raise ConfigError(
            "teacher.follow currently needs a teacher in float32",
            hint='set teacher.dtype = "float32", or leave teacher.follow out',
        )
    if config.student.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            'student.engine = "vllm" needs vLLM, which is not installed',
            hint='pip install "tropd[vllm]", or set student.engine = "transformers"',
        )


def _connect(
    run: Run,
    stack: ExitStack,
    world: World,
    started: Mapping[str, LocalTeacher],
    student: LoadedModel,
    needed_length: int,
    on_wait: Callable[[str], None],
    sleep: Callable[[float], None],
) -> dict[str, TeacherClient]:
    """A client in every process, of its own service, or of that of the first process, which knows the address."""
    connect = partial(
        connect_teachers,
        run,
        stack,
        started=started,
        tokenizer=student.tokenizer,
        stop_ids=student.stop_ids,
        needed_length=needed_length,
        on_wait=on_wait,
        sleep=sleep,
    )
    clients = connect() if world.leads else {}
    known = world.tell({name: client.url for name, client in clients.items()})
    return clients or connect(known=known)


def _reference(run: Run, folder: Path) -> Engine | None:
    if not needs_reference(run.config.objective):
        return None
    model = load_role(run, "student", folder)
    return model.engine(batch_size=1, batch_tokens=run.config.train.micro_batch(0))
