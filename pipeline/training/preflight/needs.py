"""Needs of a run, from its models' sizes: GPUs of its phases, their memory, main and shared memory, and time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import mean

from tropd.pipeline.config.schema import Config
from tropd.pipeline.models.engines.decoding_any import FIRST_STEPS
from tropd.pipeline.objectives.needs import teacher_needs
from tropd.pipeline.objectives.prefix_schedule import scheduled_length
from tropd.pipeline.training.memory_plan import (
    BYTES,
    GATHERED,
    GPU_BYTES,
    LIBRARIES,
    MemoryPart,
    ModelShape,
    kv_bytes_per_token,
    kv_columns,
    masks_rows,
    memory_parts,
    peak_bytes,
    vllm_part,
)
from tropd.pipeline.training.preflight.rates import GpuRates, load_rates
from tropd.pipeline.training.preflight.step_time import (
    NodeLayout,
    StepTime,
    StepWork,
    predict,
    score_seconds,
)

PROMPT = 200
"""Tokens of a prompt where the prompts are not known."""
VLLM_BESIDE = 2e9
"""Of vLLM's share of a GPU: what is neither weights nor keys and values."""
FOR_NCCL = 1e9
"""In /dev/shm, as NCCL's documentation asks of containers."""


@dataclass(frozen=True)
class Needs:
    """A run on a number of GPUs (or processes on a CPU), and the sizes of its models."""

    config: Config
    """With ``runtime.device`` decided: ``cpu`` or ``cuda``."""
    gpus: int
    """Processes, each with a GPU of its own."""
    student: ModelShape
    teacher: ModelShape
    prompt: int = PROMPT
    """Tokens of the longest prompt."""
    machines: int = 1
    """Over which the processes are spread evenly."""
    gpu_bytes: float = GPU_BYTES
    """Memory of each GPU; on a CPU a process's part of main memory."""
    rates: GpuRates = field(default_factory=load_rates)

    @property
    def on_cpu(self) -> bool:
        return self.config.runtime.device == "cpu"

    @property
    def here(self) -> int:
        """Processes of one machine."""
        return max(1, self.gpus // self.machines)

    def with_short_responses(self) -> Needs:
        """The least that the run needs: what it takes if no response is longer than the first buffer for it."""
        config, few = self.config, min(self.config.rollout.max_tokens, FIRST_STEPS)
        rollout = config.rollout.model_copy(update={"max_tokens": few})
        prefixes = config.prefixes.model_copy(update={"max_tokens": min(config.prefix_max_tokens, few)})
        return replace(self, config=config.model_copy(update={"rollout": rollout, "prefixes": prefixes}))

    @property
    def asks(self) -> bool:
        """Whether training asks a teacher."""
        return (
            self.config.objective.rollouts == "student"
            and teacher_needs(self.config.objective).token_logprobs
        )

    @property
    def teachers(self) -> int:
        """Services that training starts on a GPU that has any."""
        own = [self.config.teacher, *self.config.teacher.by_domain]
        return sum(not teacher.urls for teacher in own) if self.asks else 0

    @property
    def layout(self) -> NodeLayout:
        config = self.config
        share = config.vllm.gpu_memory_utilization * self.gpu_bytes
        urls = config.teacher.urls
        return NodeLayout(
            trainers=self.gpus,
            student=config.student.engine,
            servers=len(urls),
            everywhere=teacher_everywhere(config),
            scorer=config.teacher.scorer,
            batch_size=config.rollout.batch_size,
            micro_batch_tokens=config.train.micro_batch(self.prompt + config.rollout.max_tokens),
            masks=masks_rows(config, on_gpu=True),
            kv_room=max(1e9, share - 2 * self.student.parameters - VLLM_BESIDE),
        )

    def work(self, length: int | None = None) -> StepWork:
        """The rows of a step, all of full length (or of this)."""
        rollout = self.config.rollout
        rows = rollout.prompts_per_step * rollout.samples_per_prompt
        needs = teacher_needs(self.config.objective)
        return StepWork(
            self.prompt,
            (length or rollout.max_tokens,) * rows,
            own_share(self.config),
            needs.topk != "none" or needs.chosen > 0,
        )

    def step(self) -> StepTime:
        """The predicted time of a step whose responses all have full length."""
        return predict(
            self.layout, self.work(), self.student, self.teacher if self.asks else None, self.rates
        )

    def training(self) -> dict[str, list[MemoryPart]]:
        """Parts of memory in training, by the GPUs that have them."""
        parts = self._parts(self.teachers > 0)
        if self.gpus == 1:
            return {"the process" if self.on_cpu else "the GPU": parts}
        kind = "process" if self.on_cpu else "GPU"
        if not self.teachers or teacher_everywhere(self.config):
            return {f"each {kind}": parts}
        return {f"{kind} 0": parts, f"each other {kind}": self._parts(False)}

    def _parts(self, teacher: bool) -> list[MemoryPart]:
        parts = memory_parts(
            self.config,
            self.student,
            self.teacher if teacher else None,
            self.gpus,
            longest_prompt=self.prompt,
            gpu_bytes=self.gpu_bytes,
        )
        if teacher and self.teachers > 1:
            size = BYTES[self.config.teacher.settled_dtype] * self.teacher.parameters
            name, fix = "teachers of domains, if as large", "teacher.by_domain: url on another GPU"
            parts.append(MemoryPart(name, (self.teachers - 1) * size, fix))
        return parts

    @property
    def gathers_once(self) -> bool:
        """Whether every process has room to gather weights and reduce gradients once in a step."""
        return all(any(part.name == GATHERED for part in parts) for parts in self.training().values())

    def prefixes(self) -> list[MemoryPart]:
        """Parts of a GPU's memory while the teacher writes."""
        config = self.config
        if config.teacher.engine == "vllm":
            return [vllm_part("teacher in vLLM", config, self.gpu_bytes)]
        columns = kv_columns(self.prompt, config.prefix_max_tokens)
        kv = columns * kv_bytes_per_token(self.teacher, BYTES[config.teacher.settled_dtype])
        return [
            self._weights(),
            MemoryPart("KV cache of prefixes", config.prefixes.batch_size * kv, "prefixes.batch_size"),
        ]

    def scores(self) -> list[MemoryPart]:
        """Parts of a GPU's memory while the teacher scores what it wrote."""
        config = self.config
        if config.teacher.scorer == "vllm":
            return [vllm_part("teacher in vLLM", config, self.gpu_bytes)]
        scored = max(config.scores.batch_tokens, self.prompt + config.prefix_max_tokens)
        width = 4 * (self.teacher.hidden + self.teacher.intermediate)
        passed = BYTES[config.teacher.settled_dtype] * width * scored
        return [self._weights(), MemoryPart("a scoring pass", float(passed), "scores.batch_tokens")]

    def _weights(self) -> MemoryPart:
        size = BYTES[self.config.teacher.settled_dtype] * self.teacher.parameters
        return MemoryPart("teacher", float(size), 'teacher.dtype = "bfloat16"')

    def host_bytes(self) -> float:
        """Main memory of all processes of training: each loads the student in float32, a service its teacher."""
        if self.on_cpu:
            return self.here * max(peak_bytes(parts) for parts in self.training().values())
        services = self.teachers * (self.here if teacher_everywhere(self.config) else 1)
        engines = self.here * (self.config.student.engine == "vllm" or self.config.train.max_staleness > 0)
        processes = self.here + services + engines
        weights = 4.0 * self.here * self.student.parameters
        return weights + services * self._weights().bytes + processes * LIBRARIES

    def shared_bytes(self, *, hands_over: bool = True) -> float:
        """Bytes in /dev/shm: weights for an engine in another process, buffers of NCCL.

        Args:
            hands_over: whether a process can open the memory of another one's GPU instead.
        """
        config, needed = self.config, 0.0
        if config.train.max_staleness and config.student.engine == "transformers":
            whole = self.gpus == 1 and config.student.lora is None
            size = 4 if whole else BYTES[config.student.settled_dtype]
            needed += float(self.here * size * self.student.parameters)
        if config.student.engine == "vllm" and not self.on_cpu:
            alone = config.vllm.tensor_parallel_size == 1
            engines = self.here if alone and not hands_over else int(not alone)
            needed += float(engines * BYTES[config.student.settled_dtype] * self.student.parameters)
        return needed + (FOR_NCCL if self.here > 1 and not self.on_cpu else 0.0)

    def longest_answer(self) -> float:
        """Seconds of work on the largest request to the teacher; time in a queue is not counted by its client either."""
        work = self.work()
        whole = score_seconds(self.layout, work, self.teacher, self.rates)
        request = min(self.config.service.max_request_tokens, work.tokens / self.gpus)
        return whole * request / work.tokens


def teacher_everywhere(config: Config) -> bool:
    """Whether each process has the teacher on its own GPU."""
    spread = config.teacher.scorer == "vllm" and config.vllm.tensor_parallel_size > 1
    return config.teacher.placement == "every" and not spread


def own_share(config: Config) -> float:
    """Share of a response that the student writes itself, on average over the steps."""
    steps, most = config.train.steps, config.rollout.max_tokens
    longest = min(most, config.prefix_max_tokens)
    prefixes = [
        scheduled_length(config.objective.schedule, step=step, total_steps=steps, max_tokens=longest)
        for step in range(steps)
    ]
    part = 1.0 if config.objective.schedule.length == "max" else 0.5
    return 1.0 - part * mean(prefixes) / most
