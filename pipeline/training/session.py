"""Everything a training run holds in memory, assembled and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tropd.pipeline.context import (
    LoadedModel,
    Run,
    load_role,
    loading,
)
from tropd.pipeline.engines.base import Engine, SequenceScores
from tropd.pipeline.engines.compiled import compile_layers
from tropd.pipeline.models import (
    DTYPES,
    configure_runtime,
    model_directory,
)
from tropd.pipeline.objectives.needs import TeacherNeeds, needs_reference, teacher_needs
from tropd.pipeline.problems.encoding import Encoded
from tropd.pipeline.problems.selection import spread
from tropd.pipeline.teacher.client import TeacherClient
from tropd.pipeline.teacher.connection import connect_teachers, start_teachers
from tropd.pipeline.teacher.process import LocalTeacher
from tropd.pipeline.teachers import teacher_of
from tropd.pipeline.tokenizers import num_tokens
from tropd.pipeline.training.batch import RaggedTopk
from tropd.pipeline.training.held_out import HeldOutSet, read_held_out
from tropd.pipeline.training.inputs import Inputs, read_inputs
from tropd.pipeline.training.lora import check_peft
from tropd.pipeline.training.optimizer import make_optimizer
from tropd.pipeline.training.proof import prove_pass
from tropd.pipeline.training.rolling import Rolling, rollout_engine
from tropd.pipeline.training.rollouts import Row
from tropd.pipeline.training.student import (
    StudentPass,
    check_attention,
    shard,
    trainable_student,
    whole_student,
)
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError


@dataclass(frozen=True)
class Session:
    """What the loop needs. Models share the process; the teacher is behind ``scorer``."""

    run: Run
    world: World
    aside: World
    """The same for the thread that prepares the next step."""
    inputs: Inputs
    """Prompts, and what the stages before have made."""
    student: LoadedModel
    passes: StudentPass
    """The student as it is trained, sharded where there are several processes."""
    rolling: Rolling
    """The engine that rolls out with the student's weights."""
    optimizer: torch.optim.Optimizer
    scorers: dict[str, TeacherClient]
    """Clients of the teachers by name (see ``teachers``); none where all scores are on disk."""
    reference: Engine | None
    problems: Encoded | None
    """Those with an answer that are evaluated along the way, spread over all."""
    held_out: HeldOutSet | None
    """What the student is compared with its teacher on along the way."""

    @property
    def needs(self) -> TeacherNeeds:
        """What the objective asks of the teacher."""
        return teacher_needs(self.run.config.objective)

    @property
    def precision(self) -> torch.dtype | None:
        """The student's passes are in this precision; None: in that of its weights."""
        return self.passes.precision

    @property
    def ahead(self) -> bool:
        """Whether the next step is prepared while one trains."""
        return self.run.config.train.max_staleness > 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.student.model.parameters() if p.requires_grad]

    @property
    def vocab_limit(self) -> int:
        """Ids that mean something to the student: rows of its output layer that are no tokens do not count."""
        return num_tokens(self.student.tokenizer)

    def traffic(self) -> dict[str, int]:
        """What was asked of the teacher so far, under the names of the metrics."""
        clients = self.scorers.values()
        return {
            "teacher_tokens_scored": sum(client.tokens_scored for client in clients),
            "teacher_topk_tokens": sum(client.topk_tokens for client in clients),
            "teacher_bytes_sent": sum(client.bytes_sent for client in clients),
            "teacher_bytes_received": sum(client.bytes_received for client in clients),
        }

    def teacher_of(self, row: Row) -> str:
        """Name of the teacher of a row."""
        return teacher_of(self.run, self.inputs.prompts[row.plan.prompt_index].domain)

    def retries(self) -> list[int]:
        """Failed attempts so far per server, in the order of ``teacher.url``."""
        return [replica.retries for client in self.scorers.values() for replica in client.replicas]

    def reference_logprobs(self, rows: list[Row]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """``[T]`` log π_ref of the student's tokens, if the objective scales rewards."""
        if self.reference is None:
            return None
        written = [row for row in rows if row.tokens]
        reference = self.reference

        def score(share: list[Row]) -> list[SequenceScores]:
            return reference.score([r.sequence for r in share], [len(r.context) for r in share])

        scores = self.aside.spread(written, score)
        return np.concatenate([s.sampled for s in scores]) if scores else np.zeros(0, dtype=np.float32)

    def guidance_topk(self, rows: list[Row]) -> RaggedTopk | None:
        """Cached alternatives of the step's prefix tokens, if the objective learns from them."""
        cached, prefixes = self.inputs.cached, self.inputs.store
        if cached is None or prefixes is None:
            return None
        return cached.prefixes(rows, prefixes, self.run.config.objective.k)


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
        on_wait: told why nothing happens while the teacher is away.
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
    # Before services take memory: a teacher is loaded here for it.
    held_out = None
    if inputs.problems is not None and config.evaluation.distance_prompts:
        held_out = world.tell(read_held_out(run, inputs.problems) if world.leads else None)
    asks = needs.sampled and objective.rollouts != "stored"
    # A teacher loads while the student does; but vLLM measures how much memory is free while it loads.
    at_once = "vllm" not in (config.teacher.engine, config.student.engine)
    started = start_teachers(run, stack) if asks and at_once and world.leads else {}
    with loading(run, "student", folder):
        student = trainable_student(run, folder, device, world)
    whole_model = student.model if world.size == 1 else whole_student(run, folder)
    rolling = rollout_engine(run, stack, student, whole_model, folder, precision)
    longest = max(len(tokens) for tokens in inputs.encoded) + config.rollout.max_tokens
    scorers = {}
    if asks:
        if world.leads and not at_once:
            started = start_teachers(run, stack)
        scorers = _connect(run, stack, world, started, student, longest, on_wait, sleep)
    passes = StudentPass(student.model, precision, num_tokens(student.tokenizer))
    if config.train.attention != "auto" and passes.packing == "padded":
        raise ConfigError(
            f"with train.attention = {config.train.attention!r} {type(student.model).__name__} does not tell rows "
            "in one line apart",
            hint='set train.attention = "auto"',
        )
    if world.size == 1:  # sharded, its parts are in main memory here
        prove_pass(passes, inputs.encoded, precision)
    if student.compiles:
        compile_layers(student.model)
    shard(passes, world, precision)
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
    )


def _graded(run: Run, problems: Encoded | None) -> Encoded | None:
    if problems is None:
        return None
    graded = [i for i, prompt in enumerate(problems.prompts) if prompt.answer is not None]
    some = [graded[i] for i in spread(len(graded), run.config.train.evaluate_problems)]
    return replace(
        problems, prompts=[problems.prompts[i] for i in some], tokens=[problems.tokens[i] for i in some]
    )


def _check_settings(run: Run, world: World) -> None:
    """Refuse before anything is loaded what this machine, or its processes, cannot do.

    Raises:
        ConfigError: naming the setting.
    """
    config = run.config
    check_peft(config.student.lora)
    check_attention(run, world)
    if world.size > 1 and config.student.engine == "vllm":
        raise ConfigError(
            'student.engine = "vllm" trains in a single process so far',
            hint='set student.engine = "transformers" under torchrun (teacher.engine may be vllm)',
        )
    if world.size > 1 and config.train.region_gradients:
        raise ConfigError(
            "train.region_gradients needs a single process", hint="set it to false, or run without torchrun"
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
    """Every process is a client; the first knows where the services are that it has started."""
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
    return model.engine(batch_size=1, batch_tokens=run.config.train.micro_batch_tokens)
