"""Settings of the models: teacher, student, the engines and the service that run them."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tropd.pipeline.config.sections.value_types import (
    MOST,
    MOST_ROWS,
    MOST_TOKENS,
    WEEK,
    Device,
    Dtype,
    DtypeChoice,
    EngineName,
    Number,
    Template,
    Whole,
)
from tropd.pipeline.objectives.spec import Spec

TAKEN = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "system",
    }
)  # fmt: skip
"""Names of arguments that a chat template gets from elsewhere."""


class RuntimeConfig(Spec):
    """Use of this machine. Nothing here changes results beyond rounding."""

    device: Device = "auto"
    """Device of the models; auto takes CUDA if available."""
    threads: int | None = Field(default=None, ge=0, le=4096)
    """Intra-op CPU threads per process; 0 leaves PyTorch's choice, usually a thread for each core. If not set: 1 for tiny
    models (weights below 64 MB), whose threads would mostly wait, spin, and slow each other down; otherwise as 0."""
    compile: bool = False
    """Compile the layers of models (torch.compile), for long runs of tiny models: they train and score in 10 to 25 % less
    time, and sample on a CPU in about 40 % less. A model of 135M parameters gains 7 % of a step on a CPU, after half a
    minute to minutes at the start of each process. Needs a C++ compiler on a CPU. A resumed run may then differ in the
    last digits. vLLM ignores this."""
    cuda_graphs: bool = False
    """On a GPU, without vLLM: launch each decoding step of Llama, Mistral, Qwen2 and Qwen3 at once (CUDA graphs). Each
    process first compares them with the model itself, and does without where they fail or differ. Off until somebody has
    run it on a GPU: docs/scale.md, Decoding without vLLM."""


class ModelConfig(Spec):
    """A causal language model in Hugging Face format (safetensors)."""

    model: str
    """Directory (relative to the workspace, or absolute) or a name on the Hugging Face hub."""
    dtype: DtypeChoice = "auto"
    """Precision of the weights in memory; of a student in training, whose weights are float32, that of matrix
    products. Logits and log-probs are float32 in any case. auto: what earlier stages of the workspace took; in a new
    one bfloat16 on CUDA and float32 on a CPU, of which many have no instructions for bfloat16."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: leave it off unless you have read that code."""
    engine: EngineName = "transformers"
    """Engine that samples and scores with it: `transformers`, in this process, or `vllm` (pip install "tropd[vllm]")."""
    chat_template_args: dict[str, bool | Whole | Number | str] = Field(default_factory=dict)
    """Arguments of its chat template, such as `{ enable_thinking = false }`."""
    chat_template_file: str | None = Field(default=None, min_length=1)
    """A chat template (Jinja) in place of that of its tokenizer. A relative path is inside the workspace."""

    @field_validator("chat_template_args")
    @classmethod
    def _are_the_templates(cls, args: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(args.keys() & TAKEN):
            raise ValueError(
                f"{', '.join(taken)} cannot be set here: tropd itself, or data.system, says that"
            )
        return args

    @property
    def settled_dtype(self) -> Dtype:
        """``dtype`` of an open run, whose automatic settings are decided (see ``automatic``)."""
        if self.dtype == "auto":
            raise ValueError(f"dtype of {self.model} is not decided yet: read it from Run.config")
        return self.dtype

    @property
    def scorer(self) -> EngineName:
        """The engine that scores."""
        return self.engine


class TeacherContext(Spec):
    """A text that the teacher reads in place of the student's prompt. Scored are the same response tokens."""

    template: Template
    """The prompt with other fields of its record, by name or path in braces, such as
    `"{prompt}\\n\\nReference solution: {answer}"`. {prompt} is the text of the user's last turn."""
    system: str | None = Field(default=None, min_length=1)
    """With data.chat = true, the system message, also with fields in braces; the student's if not set."""
    prefixes: bool = False
    """Teacher prefixes are generated with it too; otherwise from the student's prompt."""


class FollowSettings(Spec):
    """A teacher that follows the student while it trains; it scores in the process that trains."""

    every: int = Field(default=1, ge=1, le=MOST)
    """Steps between two changes of its weights."""
    decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of its own weights that stays then: 0 takes the student's as they are, 0.999 is a slow moving average."""


class ServedTeacher(ModelConfig):
    """A teacher, and the service that scores with it during training."""

    url: str | tuple[str, ...] | None = None
    """A scoring service that is already running (`tropd serve-teacher`, or vLLM's `vllm serve`), or a list of several
    with the same teacher; if not set, `tropd train` starts one on a free loopback port."""
    placement: Literal["every", "first"] = "every"
    """Processes of a training run that have the service that is started on their GPU: every one its own, or the first
    process one for all. A teacher that vLLM spreads over several GPUs is started once."""
    token_env: str = "TROPD_TEACHER_TOKEN"
    """Environment variable with the bearer token of that service."""
    timeout_seconds: float = Field(default=300.0, gt=0, le=WEEK)
    """Seconds that the trainer keeps asking for an answer before it stops, with everything saved. Time in which a request
    waits in the service's queue, behind those of others, does not count."""
    scoring_engine: EngineName | None = None
    """Engine that scores with the teacher (the cache, the service, distances); `engine`, which writes its responses, if
    not set. `transformers` gives entropies, and computes alternatives only where they are asked for."""

    context: TeacherContext | None = None
    """A context of its own, wherever the teacher scores: a reference answer, a hint, feedback, another system message."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if url is not None and not url:
            raise ValueError("no address is given; a service's address looks like http://host:port")
        for one in (url,) if isinstance(url, str) else url or ():
            parts = urlsplit(one)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"a service's address looks like http://host:port, not {one!r}")
        return url

    @property
    def scorer(self) -> EngineName:
        """The engine that scores."""
        return self.scoring_engine or self.engine

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of running services; none if one is to be started."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()


class DomainTeacher(ServedTeacher):
    """The teacher of one domain's prompts. Fields are those of [teacher]."""

    domain: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]*$")
    """The domain, as prompts name it (data.domain_field)."""


class TeacherConfig(ServedTeacher):
    """The teacher, and the service that scores with it during training."""

    model: str = "models/teacher"
    """Directory (relative to the workspace, or absolute), a name on the Hugging Face hub, or `student`: the student as it
    is before training."""
    by_domain: tuple[DomainTeacher, ...] = ()
    """Other teachers for prompts of some domains. All must have the student's tokenizer."""
    follow: FollowSettings | None = None
    """With model = "student": the teacher's weights follow the student's while it trains; frozen if not set."""

    def context_of(self, domain: str) -> TeacherContext | None:
        """The context of the teacher that prompts of a domain have."""
        return next((own.context for own in self.by_domain if own.domain == domain), self.context)

    @property
    def contexts(self) -> tuple[TeacherContext, ...]:
        """The contexts of all teachers that have one."""
        return tuple(own.context for own in (self, *self.by_domain) if own.context is not None)

    @field_validator("by_domain")
    @classmethod
    def _once_each(cls, teachers: tuple[DomainTeacher, ...]) -> tuple[DomainTeacher, ...]:
        names = [teacher.domain for teacher in teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"a domain has one teacher, not several ({', '.join(names)})")
        return teachers


class LoraSettings(Spec):
    """Low-rank adapters instead of all weights: less memory for gradients and optimizer, smaller checkpoints."""

    rank: int = Field(default=32, ge=1, le=MOST_ROWS)
    """Rank of the adapters of every linear layer."""
    alpha: float = Field(default=64.0, gt=0.0, le=1e6)
    """The adapters' product is scaled by alpha / rank."""


class StudentConfig(ModelConfig):
    """The student."""

    model: str = "models/student"
    """Directory (relative to the workspace, or absolute) or a name on the Hugging Face hub."""
    lora: LoraSettings | None = None
    """Train low-rank adapters (pip install "tropd[lora]"), merged into the exported student; all weights if not set."""


class VllmConfig(Spec):
    """Settings of vLLM for a model whose `engine` is `vllm`."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """GPUs that a model is spread over."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that vLLM takes; lower it where the student trains on the same GPU."""
    max_model_len: int | None = Field(default=None, ge=2, le=MOST_TOKENS)
    """Longest sequence, prompt included; the model's own limit if not set. Shorter takes less memory."""
    enforce_eager: bool = False
    """No CUDA graphs: slower, starts faster."""
    quantization: str | None = None
    """Quantization method of the weights (`fp8`, `awq`, …); the model's own if not set."""
    check_every: int = Field(default=10, ge=1, le=MOST)
    """In training, steps between two checks that engine and trainer agree (besides that after the first update)."""
    max_mean_difference: float = Field(default=0.1, gt=0.0, le=100.0)
    """Training stops if their log-probs of the rollouts differ by more than this on average, in nats."""
    start_seconds: float = Field(default=900.0, gt=0.0, le=WEEK)
    """Longest time in which the process of a student's engine is ready; then training stops."""
    update_seconds: float = Field(default=300.0, gt=0.0, le=WEEK)
    """Longest time in which it takes the student's new weights, falls asleep or wakes up; then training stops."""
    answer_seconds: float = Field(default=7200.0, gt=0.0, le=WEEK)
    """Longest time in which it writes the responses of a step; then training stops, with the last checkpoint."""

    def room(self, longest: int) -> int:
        """Most tokens of a sequence, of a model that takes ``longest``: scoring generates one more."""
        return min(self.max_model_len or longest, longest) - 1


class ServiceConfig(Spec):
    """The teacher-scoring service."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a bearer token in the environment."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port; 0 takes a free one."""
    batch_tokens: int = Field(default=16384, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward pass; small requests of clients that do not train are scored together up to
    this. A run that trains with `teacher.url` asks about so many rows at once as fit into it at full length."""
    queue_tokens: int = Field(default=1 << 20, ge=1, le=MOST_TOKENS)
    """Tokens that may wait; beyond this a client that has a request waiting is answered 429 with Retry-After."""
    max_request_tokens: int = Field(default=1 << 18, ge=1, le=MOST_TOKENS)
    """Largest request, in tokens."""
    max_request_bytes: int = Field(default=64 << 20, ge=4096, le=1 << 36)
    """Largest request body."""
    max_connections: int = Field(default=512, ge=1, le=1 << 16)
    """Most open connections; beyond this, those that have kept the service waiting longest are cut."""
    header_seconds: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time for the whole header of a request, and between two requests of a connection."""
    body_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Longest time for the whole body of a request."""
    answer_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Longest time in which a client reads its answer."""
    stop_seconds: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time to score queued requests after the service is asked to stop."""
